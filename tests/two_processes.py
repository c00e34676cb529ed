"""Run by test_embed_step.py on two gloo processes: write the gradient that DDP leaves on each."""

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]
import train_embed_lora  # noqa: E402
import utils  # noqa: E402


def gradient_instead(trainer, *_):
    """Run one step of rows 0-31, the rank's half each, as Trainer would: DDP around the model."""
    generator, rank = torch.Generator().manual_seed(0), trainer.accelerator.process_index
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model = trainer.accelerator.prepare_model(trainer.model)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    rows = [trainer.train_dataset[i] for i in range(16 * rank, 16 * rank + 16)]
    trainer.training_step(model, trainer.data_collator(rows))
    flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    torch.save(flat, Path(sys.argv[1]) / f"gradient{rank}.pt")
    sys.exit(0)


utils.train = gradient_instead
train_embed_lora.main([*json.loads(sys.argv[2]), "--output_dir", sys.argv[1] + "/two"])
