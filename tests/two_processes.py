"""Run on two gloo processes by the tests of both steps: write the gradient that each ends with.

python tests/two_processes.py WORK_FOLDER MODULE FLAGS_AS_JSON FIRST_ROW ROWS_PER_PROCESS GLOBAL_STEP \
    FORWARD_PASSES_THAT_FAIL
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import utils  # noqa: E402
from conftest import rehearsed_trainer  # noqa: E402

work, module, flags = sys.argv[1], importlib.import_module(sys.argv[2]), json.loads(sys.argv[3])
first, count, global_step = map(int, sys.argv[4:7])
fails = json.loads(sys.argv[7])


prepared = module.prepare([*flags, "--output_dir", f"{work}/two"])
trainer = rehearsed_trainer(prepared)
rank = trainer.accelerator.process_index
# one step, each rank its own rows, as Trainer would: DDP around the model
model = trainer.accelerator.prepare_model(trainer.model)
assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
trainer.state.global_step = global_step
start, total = first + count * rank, len(trainer.train_dataset)
# the last step repeats rows
rows = [trainer.train_dataset[i % total] for i in range(start, start + count)]
passes = []


def run_out(*_):
    passes.append(1)
    if len(passes) in fails:
        raise torch.OutOfMemoryError("CUDA out of memory.")


if rank == 1:
    trainer.model.get_base_model().register_forward_pre_hook(run_out)
trainer.training_step(model, trainer.data_collator(rows))
(Path(work) / f"halvings{rank}").write_text(str(trainer.halvings))
flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
torch.save(flat, Path(work) / f"gradient{rank}.pt")
torch.distributed.barrier()
utils.leave_process_group()
