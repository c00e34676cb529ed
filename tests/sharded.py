"""Run by torchrun: the base in parts; write the gradients of all cases, and what was in parts.

torchrun ... tests/sharded.py WORK_FOLDER

WORK_FOLDER/cases.json: [{"name", "module", "flags": [...], "rows": [rows of each process]}]. Leaves
NAME-RANK.pt: {"gradient", "passes": of the base in the step, "alone": pieces that this process
would have cut by itself, "sequences", "trained": numbers, "shares": [(rows, local rows)],
"gathered": {module: numbers that are gathered for it}}.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import utils  # noqa: E402
from conftest import rehearsed_trainer  # noqa: E402
from parts import shards  # noqa: E402

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402


def run_case(case, work):
    """Run one step of a case, as Trainer would: DDP around the model; return what it left."""
    module = importlib.import_module(case["module"])
    folder = str(work / f"out-{case['name']}")
    prepared = module.prepare([*case["flags"], "--output_dir", folder, "--overwrite"])
    trainer = rehearsed_trainer(prepared)
    model = trainer.accelerator.prepare_model(trainer.model)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    rank = trainer.accelerator.process_index
    rows = [trainer.train_dataset[i] for i in case["rows"][rank]]
    shares = []
    shards.let_go(trainer.model)  # the head, which stays gathered behind a pass
    for parameter in trainer.model.parameters():
        assert isinstance(parameter, DTensor) != parameter.requires_grad
        if isinstance(parameter, DTensor):
            shares.append((len(parameter), len(parameter.to_local())))
    blocks = trainer.model.get_base_model().named_modules()
    gathered = {name: own_numbers(each) for name, each in blocks if isinstance(each, FSDPModule)}
    alone = pieces_alone(trainer, rows)
    step = trainer.data_collator(rows)
    sequences = len(step["sequences"])
    passes = []
    hook = trainer.model.get_base_model().register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.training_step(model, step)
    hook.remove()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        "gradient": torch.cat([p.grad.flatten() for p in trained]),
        "passes": len(passes),
        "alone": alone,
        "sequences": sequences,
        "trained": sum(p.numel() for p in trained),
        "shares": shares,
        "gathered": gathered,
    }


def own_numbers(module):
    """Return how many numbers are gathered for a module, but for what its own parts gather."""
    inner = set()
    for other in module.modules():
        if other is not module and isinstance(other, FSDPModule):
            inner.update(map(id, other.parameters()))
    own = {id(p): p.numel() for p in module.parameters() if not p.requires_grad}
    return sum(size for key, size in own.items() if key not in inner)


def pieces_alone(trainer, rows):
    """Return how many pieces the rows make where no process asks the others."""
    trainer.in_parts = False
    pieces, _ = trainer.cut_step(trainer.data_collator(rows))
    trainer.in_parts = True
    return len(pieces)


def main():
    work = Path(sys.argv[1])
    for case in json.loads((work / "cases.json").read_text()):
        left = run_case(case, work)
        torch.save(left, work / f"{case['name']}-{torch.distributed.get_rank()}.pt")
        torch.distributed.barrier()
    utils.leave_process_group()


if __name__ == "__main__":
    main()
