"""The proof: what was saved is read back from disk, and must be what was trained."""

import tempfile

from parts.card import write_card
from parts.tokenizer import saved_inputs
from utils import InputError, say, write_json

import torch
from peft import PeftModel

# of the outputs of what was saved, relative: what rounding may leave, and no lost weight would
MAX_ERROR = {"half": 1e-2, "float32": 1e-5}


def check_saved_tokenizer(prepared):
    """Raise InputError if the tokenizer would be read back from final/ as another one."""
    # before training: some classes rebuild on loading what was changed in them
    tokenizer = prepared.trainer.processing_class
    with tempfile.TemporaryDirectory() as trial:
        tokenizer.save_pretrained(trial)
        saved_inputs(trial, tokenizer, prepared.inputs, prepared.origin)


def save_final(prepared, before, after):
    """Write final/: weights, tokenizer, what made them, in files that everybody may read.

    before, after: the metrics of the dev sets, which its model card shows.
    """
    trainer = prepared.trainer
    folder = prepared.output_dir / "final"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        write_json(folder / "training_config.json", prepared.record)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, which a server's user cannot read
        prepared.write_files(folder)
        metrics = before_and_after(before, after, prepared.plan.shown)
        write_card(folder, prepared.origin, prepared.record, metrics)
    trainer.accelerator.wait_for_everyone()


def before_and_after(before, after, shown):
    """Return {name: (before, after)} of the shown metrics that both have."""
    metrics = {}
    for name in shown:
        key = f"eval_{name}"  # as Trainer has it
        if key in before and key in after:
            metrics[name] = before[key], after[key]
    return metrics


def prove(prepared, untrained):
    """Load final/ from disk and compare its outputs (N, D) with the live and `untrained` model's.

    Returns {"relative_error", "relative_change"}. Raises RuntimeError if the model on disk differs
    from the live one, and InputError if its tokenizer does, if it does not differ from the base, or
    if its outputs are no numbers.
    """
    trainer = prepared.trainer
    folder = str(prepared.output_dir / "final")
    tokenizer = trainer.processing_class
    # with the saved tokenizer's ids, as whoever loads the folder will ask it
    ids = saved_inputs(folder, tokenizer, prepared.inputs, prepared.origin)
    live = prepared.outputs(prepared.inputs(tokenizer))
    if not live.isfinite().all():  # NaN differs from everything, and is larger than nothing
        raise InputError(
            f"{folder} gives NaN or infinity: take an earlier checkpoint, lower --lr, or pass "
            "--mixed_precision none."
        )
    saved = reloaded_outputs(prepared, folder, ids)
    error = relative_difference(saved, live)
    change = relative_difference(untrained, live)
    half = trainer.args.fp16 or trainer.args.bf16
    if not error <= MAX_ERROR["half" if half else "float32"]:
        raise RuntimeError(
            f"{folder} does not give the trained model's outputs: relative error {error:.1e}."
        )
    if change == 0:
        raise InputError(
            f"{folder} changes nothing: its outputs are those before training. Raise --lr or "
            "--epochs."
        )
    say(
        f"proof     {folder}, read back from disk, gives the trained outputs (relative error "
        f"{error:.0e}); training has changed these outputs by {change:.1%}"
    )
    return {"relative_error": error, "relative_change": change}


def relative_difference(outputs, live):
    """Return the norm of the difference of two outputs (N, D), relative to the live model's."""
    return (outputs - live).norm().item() / live.norm().item()


def reloaded_outputs(prepared, folder, ids):
    """Return the outputs of what stands in `folder`; the trainer has its own model again after."""
    trainer = prepared.trainer
    model = trainer.model
    if isinstance(model, PeftModel):  # a second adapter on the base that is in memory already
        model.load_adapter(folder, adapter_name="reloaded")
        model.set_adapter("reloaded")
        outputs = prepared.outputs(ids)
        model.set_adapter("default")
        model.delete_adapter("reloaded")
        return outputs
    # float32, as full fine-tuning trains and saves
    saved = prepared.auto_class.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=prepared.origin.trust_remote_code
    )
    trainer.model = saved.to(model.device)  # which `outputs` asks
    outputs = prepared.outputs(ids)
    trainer.model = model
    return outputs
