"""What several processes share out: a frozen base (as ZeRO 3 does), or an optimizer's state (1).

The base is cut while it is loaded, by transformers (FSDP2), so that all that comes before the first
step has it in parts, too: each process holds its share of every block. Adapters, their gradients
and optimizer stay whole on every process.
"""

import re

from utils import InputError, note

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

OLDEST_TORCH = (2, 8)
# of transformers' models, not public
PRIVATE = ("_no_split_modules", "_is_distributed_loading_by_transformers", "_tp_size")


def settled_stage(asked, processes):
    """Return the stage of --zero_stage that a run goes on with: 3, or 0; say why it is another.

    Raises InputError where torch or transformers is too old for it.
    """
    if asked and processes == 1:
        note(f"--zero_stage {asked}: there is one process, which holds the whole model")
        return 0
    if asked < 3:
        return 0  # what 1 or 2 would have saved is said once the sizes are known
    check_versions()
    return 3


def check_versions():
    """Raise InputError if torch or transformers lacks what a base in parts is made with."""
    if version_of(torch.__version__) < OLDEST_TORCH:
        raise InputError(
            f"--zero_stage 3 needs torch 2.8, and this is {torch.__version__}. Update it, or drop "
            "the flag."
        )
    missing = [name for name in PRIVATE if not hasattr(PreTrainedModel, name)]
    if missing:
        raise InputError(
            f"--zero_stage 3 does not know this version of transformers (no {missing[0]}). Take "
            "the one of requirements.txt, or drop the flag."
        )


def version_of(text):
    """Return (major, minor) of a version."""
    return tuple(map(int, text.split(".")[:2]))


def note_savings(asked, model):
    """Note what --zero_stage 1 or 2, which an adapter is trained without, would have saved.

    model: with its adapter, whole on each process.
    """
    processes = PartialState().num_processes
    if asked not in (1, 2) or processes == 1 or not isinstance(model, PeftModel):
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers = 2 + (asked == 2)  # AdamW's moments, and the gradient
    saved = numbers * 4 * trained / 1e9
    _, whole = bytes_of(model)
    others = 1 - 1 / processes
    note(
        f"--zero_stage {asked} runs as 0: it would have saved {saved * others:.2f} GB a process "
        f"here (of the adapter's optimizer and gradients); 3 saves {whole / 1e9 * others:.2f}"
    )


# ---------------------------------------------------------------- loading


def load_in_parts(auto_class, name, options):
    """Load a base of which each process reads and holds its share; returns (model, loading info).

    Raises InputError for a model without a block that repeats: it would be gathered whole.
    """
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        skeleton = auto_class.from_config(
            options["config"], trust_remote_code=options["trust_remote_code"]
        )
    plan = plan_of(skeleton)
    if not any("*" in pattern for pattern in plan):
        raise InputError(
            f"--zero_stage 3: neither transformers nor {type(skeleton).__name__} says which of its "
            "blocks repeat, so that it would be gathered whole. Drop the flag."
        )
    config = DistributedConfig(fsdp_size=PartialState().num_processes, fsdp_plan=plan)
    model, info = auto_class.from_pretrained(name, **options, distributed_config=config)
    # now: after a forward pass peft would freeze the gathered copies instead
    model.requires_grad_(False)
    model._is_distributed_loading_by_transformers = False  # or Trainer would refuse to resume
    model._tp_size = None  # or peft would gather all of it on one process, to save an adapter
    return model, info


def plan_of(skeleton):
    """Return {what is gathered by itself, with * for numbers: for how long} of a model.

    What transformers says of it, and the blocks that it says must not be split.
    """
    kinds = skeleton._no_split_modules or ()
    patterns = {}  # each module's
    blocks = {}
    for name, module in skeleton.named_modules():
        pattern = re.sub(r"\d+", "*", name)
        patterns[pattern] = None
        if type(module).__name__ in kinds:
            blocks[pattern] = "free_full_weight"  # as soon as it has run
    known = {name: kind for name, kind in skeleton.fsdp_plan.items() if name in patterns}
    return blocks | known


# ---------------------------------------------------------------- a model that is loaded


def is_in_parts(model):
    """Tell whether a model is in parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def leave_to_fsdp(model):
    """Tell DDP that frozen weights are none of its business."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen


def gathered(weight):
    """Return the whole of a weight, or None of None; all processes must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def let_go(model):
    """Let go of what was gathered, on all processes: one that saves would do so alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def bytes_of(model):
    """Return the bytes of a model's frozen weights: (held by this process, of all together)."""
    held = 0
    whole = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held += local.nbytes
        whole += parameter.numel() * parameter.element_size()
    return held, whole


# ---------------------------------------------------------------- an optimizer that is shared out


class SharedOptimizer(ZeroRedundancyOptimizer):
    """An optimizer of which each process holds the state of its share of the weights."""

    def state_dict(self):
        """Return the state of all shares as it was at the last `collect`; none before the first."""
        try:
            return super().state_dict()
        except RuntimeError:  # accelerate asks before the first step, when there is no state
            return torch.optim.Optimizer.state_dict(self)


def shared_optimizer(asked, model, arguments):
    """Return Trainer's (class, keywords) of an optimizer that is shared out, None for its own.

    asked: --zero_stage; an adapter's optimizer is too small to be worth it.
    """
    if asked != 1 or isinstance(model, PeftModel) or PartialState().num_processes == 1:
        return None
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return SharedOptimizer, {"optimizer_class": kind, **keywords}


def collect(optimizer):
    """Collect a shared optimizer's state on the process that saves; all must call this."""
    shared = getattr(optimizer, "optimizer", None)  # accelerate's wrapper around it
    if isinstance(shared, SharedOptimizer):
        shared.consolidate_state_dict(to=0)
