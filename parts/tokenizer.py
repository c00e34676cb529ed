"""The tokenizer: read, made to end texts in EOS, and proven to be the one that was saved."""

import os
import tempfile
from pathlib import Path

from parts.base import stored_file
from utils import InputError, no_connection, note, reason

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tekken.json",
)
# of files that are cut off or empty, of classes that need code or packages that are not here
READING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


# ---------------------------------------------------------------- reading


def load_tokenizer(origin):
    """Load the tokenizer of --init_adapter if that has one, else of the base; it pads on the right.

    origin: base.Origin. Raises InputError where there is none that can be read.
    """
    source, revision = origin.name, origin.revision
    # the adapter's has its chat template, and the EOS that texts were trained to end in
    if origin.adapter and (Path(origin.adapter) / "tokenizer_config.json").exists():
        source, revision = origin.adapter, None
    is_folder = os.path.isdir(source)
    if is_folder and not has_tokenizer(source):
        raise no_tokenizer(source)  # transformers would make one up
    try:
        tokenizer = read_tokenizer(source, origin.trust_remote_code, revision)
    except READING_ERRORS as error:
        if no_hub := no_connection(source, error):
            raise no_hub from None
        raise InputError(f"{source} has no tokenizer that can be read: {reason(error)}") from None
    if not is_folder:  # the same of a hub model, whose files are here only now
        config = stored_file(source, "config.json", revision)
        if config and not has_tokenizer(Path(config).parent):
            raise no_tokenizer(source)
    return tokenizer


def has_tokenizer(folder):
    """Tell whether a folder, of a model or of the hub's cache, has a file to read one from."""
    folder = Path(folder)
    known = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return known or any(folder.glob("*.model"))  # sentencepiece's


def no_tokenizer(source):
    """Return the InputError on a base without the files of a tokenizer."""
    return InputError(
        f"{source} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}, *.model. Copy the files "
        "of the base it was made from into it, or choose another base."
    )


def read_tokenizer(source, trust_remote_code, revision=None):
    """Return the tokenizer of a folder or of a hub model; it pads on the right."""
    # right: a causal model never sees what is behind a text, so that it needs no mask
    return AutoTokenizer.from_pretrained(
        source, revision=revision, trust_remote_code=trust_remote_code, padding_side="right"
    )


# ---------------------------------------------------------------- checks


def within_limit(name, wanted, limit, of="the base"):
    """Return a length in tokens, lowered to what the base can take, with a note.

    name: of the length; of: what the base is called in the note.
    """
    if wanted > limit:  # a longer text would crash in the forward pass
        note(f"{name} {wanted} is above the {limit} positions of {of}: lowered to {limit}")
    return int(min(wanted, limit))


def check_vocabulary(model, tokenizer, largest, name):
    """Raise InputError if `largest`, a token id of the data, has no row in the embedding.

    name: of the model, for the message.
    """
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a model that hashes its input, say
        return
    # not the tokenizer's size: vocabularies are padded, and a tokenizer may have tokens no text has
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise InputError(
            f"{name} has embeddings for {rows} tokens, and its tokenizer, of {len(tokenizer)}, "
            f"gives the data token {largest} ({token!r}): they do not belong together. Put the "
            "model's own tokenizer into its folder."
        )


def saved_inputs(folder, tokenizer, inputs, origin):
    """Return inputs(the tokenizer read back from `folder`), lists of token ids.

    Raises InputError if those of the `tokenizer` that was saved there are others: the model would
    be served with tokens that it was not trained on.
    """
    try:
        saved = read_tokenizer(folder, origin.trust_remote_code)
    except READING_ERRORS as error:
        raise InputError(
            f"the tokenizer of {origin.name}, saved, cannot be read back: {reason(error)}"
        ) from None
    found = lists_of_ids(inputs(saved))
    expected = lists_of_ids(inputs(tokenizer))
    # strict=False: which row differs says more than that one is missing
    for ids, live in zip(found, expected, strict=False):
        if ids != live:
            # repr, since a line break or a space is what they may differ in
            other = repr(tokenizer.decode(ids))[-60:]
            text = repr(tokenizer.decode(live))[-60:]
            raise InputError(
                f"the {type(tokenizer).__name__} of {origin.name}, saved and read back, gives "
                f"other tokens than in training: ...{other} in place of ...{text}. Choose another "
                "base."
            )
    if len(found) != len(expected):
        raise InputError(
            f"the chat template of {origin.name}, saved and read back, takes other rows than in "
            "training. Choose another base, or pass another --chat_template."
        )
    return found


def lists_of_ids(rows):
    """Return rows of token ids, arrays or not, as lists of plain numbers."""
    return [[int(i) for i in ids] for ids in rows]


# ---------------------------------------------------------------- what it adds to a text


def added_tokens(tokenizer):
    """Return the ids that it puts before every text, and behind it; None where nothing tells."""
    for text in ("a", "1", "的"):  # one of them any tokenizer can read
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        # where the text's own tokens stand whole; a tokenizer may read it otherwise beside others
        for start in range(len(whole) - len(bare) + 1):
            end = start + len(bare)
            if bare and whole[start:end] == bare:
                return whole[:start], whole[end:]
    return None


def append_eos(tokenizer, origin):
    """Return a tokenizer that by itself ends every text with EOS, truncated or not.

    So whoever loads it ends them too. Raises InputError if it cannot be made to.
    """
    eos = tokenizer.eos_token or tokenizer.sep_token
    if not eos or not tokenizer.is_fast:
        raise InputError(
            "--append_eos: the tokenizer has no EOS token, or is none of `tokenizers`'. Drop the "
            "flag."
        )
    kind = f"the {type(tokenizer).__name__} of {origin.name}"
    added = added_tokens(tokenizer)
    if added is None:
        raise InputError(
            f"--append_eos: {kind} reads none of 'a', '1', '的', so that it cannot be told what it "
            "puts around a text. Choose another base."
        )
    before = tokenizer.convert_ids_to_tokens(added[0])
    after = tokenizer.convert_ids_to_tokens(added[1])
    if after and is_special(tokenizer, added[1][-1]):
        note(
            f"--append_eos changes nothing: the tokenizer ends every text in {after[-1]} by itself"
        )
        return tokenizer
    after.append(eos)
    # in the tokenizer's own rules: truncation then makes room for it, and whoever loads it has it
    tokenizer.backend_tokenizer.post_processor = template_around(tokenizer, before, after)
    limit = len(before) + len(after) + 2  # two tokens of the text's own
    # tried, since whether a class keeps the rules when it is loaded is written nowhere
    if always_ends(tokenizer, eos, limit, origin.trust_remote_code):
        return tokenizer
    plain = as_plain_class(tokenizer)
    if always_ends(plain, eos, limit, origin.trust_remote_code):
        return plain
    raise InputError(
        f"--append_eos: {kind} does not end short and truncated texts in {eos} once it is saved "
        "and read back. Choose another base, or drop the flag."
    )


def is_special(tokenizer, token_id):
    """Tell whether a token is a special one, by its own account or by its name in the tokenizer."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    return bool(added and added.special) or token_id in tokenizer.all_special_ids


def template_around(tokenizer, before, after):
    """Return the post-processor that puts these tokens before and behind every text.

    Raises InputError where the library can make none of them.
    """
    ids = []
    for token in dict.fromkeys([*before, *after]):
        ids.append((token, tokenizer.convert_tokens_to_ids(token)))
    single = [*before, "$A", *after]
    # a pair is never made here, but the library wants a template for one
    pair = [*single, *before, "$B:1", *after]
    try:
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    except ValueError as error:  # a token with a colon in it, say
        raise InputError(
            f"--append_eos: no template can be made of the tokens {', '.join(before + after)} "
            f"({reason(error)}). Choose another base, or drop the flag."
        ) from None


def as_plain_class(tokenizer):
    """Return the same tokenizer in the class that takes its template as it stands.

    Some classes, such as GPTNeoXTokenizer, rebuild the template when they are loaded.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        padding_side="right",
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )


def always_ends(tokenizer, token, limit, trust_remote_code):
    """Tell whether a tokenizer, saved and read back, ends a short and a truncated text in `token`.

    limit: tokens of the truncated one.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = read_tokenizer(folder, trust_remote_code)
    end = saved.convert_tokens_to_ids(token)
    found = []
    for text in ("a", "a b c " * 100):
        found.append(saved(text, truncation=True, max_length=limit)["input_ids"])
    return len(found[1]) <= limit and all(ids[-1] == end for ids in found)
