"""What every script and room needs first: a word to the user, errors, JSON files, the process.

Import it before torch and transformers: it sets up three libraries, and imports none by itself, so
that --help and a wrong flag are answered at once.
"""

import functools
import gc
import json
import logging
import os
import sys
import warnings
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

# a step's pieces are of many sizes, and memory that is free between them is lost to larger ones.
# torch reads this as it is imported: what a notebook has imported keeps what it has
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
is_asked_for = {"PYTORCH_ALLOC_CONF", *ALLOCATOR} & os.environ.keys()
if sys.platform == "linux" and "torch" not in sys.modules and not is_asked_for:
    os.environ.update(ALLOCATOR)
# seconds before a bar is shown, which tqdm reads as it is imported: most are done by then
os.environ.setdefault("TQDM_DELAY", "2")
# bitsandbytes names an optional CPU kernel at every import
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# what these libraries will drop is theirs to mend, or ours: no user can
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate|peft")


class InputError(Exception):
    """A flag, file or model of the user's is wrong: shown without a traceback, exit code 1."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run after a step; the message says how to go on.

    A notebook shows it as the interrupt that it is; `run` makes an exit code of it.
    """

    def __init__(self, sentence, number):
        super().__init__(sentence)
        self.number = number  # of the signal


# ---------------------------------------------------------------- words

NOTES = []  # of the run that this process is in


def say(*parts):
    """Print on the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:  # torchrun sets it, before there is a process group
        print(*parts, flush=True)


def note(text):
    """Tell the user what is worth knowing, where it is found; the report lists it again."""
    NOTES.append(text)
    say(f"note      {text}")


def reason(error):
    """Return the first line of a library's error message."""
    return str(error).strip().split("\n")[0]


def no_connection(name, error):
    """Return the InputError on what the hub, out of reach, could not give; None for other errors.

    name: of a model or data set; error: what transformers, huggingface_hub or datasets raised.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error and not isinstance(error, LocalEntryNotFoundError | ConnectionError):
        error = error.__cause__
    if not error:
        return None
    if is_offline_mode():
        return InputError(
            f"no connection to the hub: HF_HUB_OFFLINE is set, and {name} is neither a folder here "
            "nor downloaded. Unset it, or give a local folder."
        )
    return InputError(
        f"no connection to the hub ({reason(error.__cause__ or error)}), and {name} is neither a "
        "folder here nor downloaded. Check the network, or the proxy (HTTPS_PROXY), or give a "
        "local folder."
    )


# ---------------------------------------------------------------- JSON files


def read_json(path):
    """Return the parsed file, or None where there is none or it does not parse."""
    try:
        # not the locale's encoding: on Windows that is another
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a power cut may leave any bytes
        return None


def checked_json(path, kind=dict):
    """Return the parsed file, None where there is none; InputError if it does not hold a `kind`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from None
    except (ValueError, RecursionError) as error:  # brackets in brackets, a thousand deep
        raise InputError(f"{path} is no valid JSON: {error}. Fetch it again.") from None
    if not isinstance(content, kind):
        found = type(content).__name__
        raise InputError(f"{path} holds a {found}, not a {kind.__name__}. Fetch it again.")
    return content


def write_json(path, content):
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    part = Path(f"{path}.part")
    text = json.dumps(content, indent=2, ensure_ascii=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)  # at once, within one file system


def recorded_flags(run):
    """Return {flag: value} of a training_config.json (a dict), as settled in that run.

    Earlier runs wrote what they settled into the flags. Raises InputError for what is no dict.
    """
    recorded = {}
    for part in ("flags", "settled"):
        values = run.get(part) or {}
        if not isinstance(values, dict):
            what = f"training_config.json of the adapter holds {str(values)[:60]} as {part}"
            raise InputError(f"{what}. Copy it again.")
        recorded |= values  # what was settled beats what was asked for
    return recorded


# ---------------------------------------------------------------- the process


def is_pasted():
    """Tell whether this is a notebook's kernel: a script was pasted whole into a cell."""
    # there, too, __name__ is "__main__", and the command line is the kernel's
    return sys.argv[0].endswith("kernel_launcher.py")


def check_command(parse_args):
    """Answer --help, a wrong flag and a wrong start of the command line, before slow imports.

    Once for all: a script that restarts on several GPUs would say it on each.
    """
    if is_pasted():
        return
    parse_args()
    try:
        refuse_many_tasks()
    except InputError as error:
        sys.exit(f"error: {error}")


def run(main):
    """Start `main` as a command: on all GPUs, with the user's mistakes in a sentence.

    Ends the process with code 1 after a mistake, 128 + its number after a signal.
    """
    if is_pasted():
        say('Defined. Now call main(["--train_file", "pairs.jsonl"]) with the flags you want.')
        return
    restart_on_all_gpus()
    code = 0
    try:
        main()
    except Stopped as stop:  # all processes stop after the same step
        say(stop)
        code = 128 + stop.number
    except KeyboardInterrupt:  # outside of the steps, or for the second time
        if int(os.environ.get("RANK", 0)) == 0:
            sentence = (
                "interrupted: where this run has left a checkpoint, the same command with its "
                "--output_dir and --resume_from_checkpoint, without --overwrite, goes on from it."
            )
            print(sentence, file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT
    except Exception as error:
        sentence = error if isinstance(error, InputError) else refusal(error)
        if sentence is None:  # a mistake of ours: its traceback is what we need
            raise
        print(f"error: {sentence}", file=sys.stderr)  # of any process: one alone may have failed
        sys.exit(1)
    leave_process_group()
    if code:
        sys.exit(code)


# what tells a task of srun's or mpirun's how many there are
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def refuse_many_tasks():
    """Raise InputError where a cluster has started this command several times over."""
    if "RANK" in os.environ:  # torchrun's: these know of one another
        return
    for name in TASKS:
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise InputError(
                f"{count} tasks were started ({name}), each of which would train by itself. Start "
                "torchrun once a machine: srun --ntasks-per-node=1 torchrun --nnodes MACHINES "
                "--nproc_per_node GPUS --rdzv_backend c10d --rdzv_id JOB "
                f"--rdzv_endpoint HOST:29500 {' '.join(sys.argv)}"
            )


def restart_on_all_gpus():
    """Replace this process by torchrun with one process a GPU, unless it is one of those."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2 or "LOCAL_RANK" in os.environ:  # which torchrun sets
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command = [sys.executable, *launcher, *sys.argv]
    say(f"{gpus} GPUs are visible: a step has {gpus} times the examples. Restarting as")
    say(f"  {' '.join(command)}")
    os.execv(sys.executable, command)  # no child: signals and exit codes are torchrun's own


def leave_process_group():
    """Leave the process group: an interpreter that ends beside gloo's threads may abort.

    https://github.com/pytorch/pytorch/issues/190489
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refusal(error):
    """Return in a sentence what the system refused (a full disk, say), or None if it did not."""
    from safetensors import SafetensorError

    number = getattr(error, "errno", None)
    text = str(error)  # libraries in Rust and torch.save have no number
    in_rust = isinstance(error, SafetensorError) or "(os error " in text
    is_full = number in (ENOSPC, EDQUOT, EFBIG)  # a disk, a quota, the largest file it can hold
    if in_rust or "PytorchStreamWriter" in text or is_full:
        return (
            f"a file cannot be written: {reason(error)}. Make room; complete checkpoints stay, and "
            "the same command with --resume_from_checkpoint goes on from the last one."
        )
    if "out of memory" in text:  # of a GPU, beside the passes that start again by themselves
        return (
            "memory ran out: lower --batch_size or --max_length, or quantise. Complete checkpoints "
            "stay, and the same command with --resume_from_checkpoint goes on from the last one."
        )
    if number:
        return f"a file cannot be read or written: {reason(error)}. Mend that, and start again."
    return None


def start_process():
    """Join the process group, if there is one, and return accelerate's state of this process."""
    import torch
    from accelerate import PartialState

    NOTES.clear()  # of an earlier run in this process
    quiet_libraries()
    has_device = torch.cuda.is_available() or torch.backends.mps.is_available()
    state = PartialState(cpu=not has_device)
    if torch.cuda.device_count() > state.num_processes:  # main([...]) in a notebook
        note(
            "several GPUs are visible and this call uses the first: start the script from a shell "
            "to use all"
        )
    return state


def gives_memory_back(main):
    """Wrap a main(argv) so that no memory is held behind it, on a GPU neither.

    A notebook's kernel lives on, and what its next cell starts may need all of it.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        import torch

        report = main(argv)
        gc.collect()  # a trainer and its callbacks refer to one another
        torch.cuda.empty_cache()
        return report

    return wrapped


def agreed(value):
    """Return the first process' value on all of them."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def shows_bars():
    """Tell whether somebody watches: bars would be glued to the lines of a log file."""
    from transformers.utils import is_in_notebook

    is_first = int(os.environ.get("RANK", 0)) == 0
    return is_first and (sys.stderr.isatty() or is_in_notebook())


def quiet_libraries():
    """Leave the terminal to this program, which says what matters of their notes."""
    import datasets
    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # who sets it wants to read it
        transformers_logging.set_verbosity_error()
    if not shows_bars():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
