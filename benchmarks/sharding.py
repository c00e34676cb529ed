"""Work out how much memory a process needs, by --zero_stage and the number of processes.

    python benchmarks/sharding.py

Arithmetic from configurations, nothing is measured: LoRA r 16 on all linear layers, a base in
16 bits, gradient checkpointing, pieces of 2,048 tokens, one process a GPU. In gigabytes (10^9).
"""

from dataclasses import dataclass

RANK = 16
TOKENS = 2048  # in memory at once
PROCESSES = (1, 2, 4, 8, 16)
GPUS = (16, 24, 40, 80)  # GB
USABLE = 0.9  # of a GPU: CUDA's own context, and gaps that an allocator leaves
# bytes a weight of NF4 with double quantisation: half a byte, and 0.127 bits for each block of 64
FOUR_BITS = (4 + 0.127) / 8


@dataclass(frozen=True)
class Architecture:
    """A decoder of Qwen3's or Llama's kind."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    def projections(self):
        """Return (inputs, outputs) of the linear layers of a block."""
        queries = self.heads * self.head_dim
        values = self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), *[(self.hidden, values)] * 2, (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.inner)] * 2, (self.inner, self.hidden)]

    def block(self):
        """Return the weights of a block."""
        return sum(inputs * outputs for inputs, outputs in self.projections())

    def embedding(self):
        """Return the weights of the embedding, as many as the head's."""
        return self.vocabulary * self.hidden

    def weights(self):
        """Return the weights of the base."""
        return self.layers * self.block() + self.embedding() * (1 if self.tied else 2)

    def adapter(self):
        """Return the weights of the adapter."""
        return self.layers * sum(RANK * sum(sizes) for sizes in self.projections())


MODELS = (
    Architecture("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, tied=True),
    Architecture("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, 151_936),
    Architecture("Qwen3-32B", 64, 5120, 25_600, 64, 8, 128, 151_936),
    Architecture("Llama-3.3-70B", 80, 8192, 28_672, 64, 8, 128, 128_256),
)


def beside_the_base(model):
    """Return the bytes that every process needs: adapter, AdamW, activations, logits."""
    trained = model.adapter() * (4 + 4 + 8)  # the weight, its gradient, two moments; in float32
    kept = model.layers * TOKENS * model.hidden * 2  # the input of each block
    # of the block that is computed again: its projections' inputs and outputs, once more in float32
    # for the adapters
    inside = TOKENS * sum(sum(sizes) for sizes in model.projections()) * (2 + 4)
    logits = 3 * 2**26 * 4  # of one chunk: themselves, their softmax, their gradient
    return trained + kept + inside + logits


def gathered(model):
    """Return the bytes of what FSDP holds whole at once: two blocks, and the embedding or head."""
    return (2 * model.block() + model.embedding()) * 2


def needed(model, processes, stage):
    """Return the bytes a process needs."""
    base = model.weights() * 2
    if stage == 3 and processes > 1:
        base = base / processes + gathered(model)
    return base + beside_the_base(model)


def needed_in_4_bits(model):
    """Return the bytes a process needs that holds the whole base in 4 bits."""
    blocks = model.layers * model.block()
    return blocks * FOUR_BITS + (model.weights() - blocks) * 2 + beside_the_base(model)


def fewest(model, gigabytes):
    """Return how many GPUs of a size hold a model in 16 bits, in words."""
    for processes in PROCESSES:
        if needed(model, processes, 3) <= USABLE * gigabytes * 1e9:
            return str(processes)
    return f"more than {PROCESSES[-1]}"


def row(cells):
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main():
    """Print both tables."""
    print(row(["GB a process", "stage 0", *(f"3, {n} GPUs" for n in PROCESSES[1:]), "4 bits"]))
    print(row(["---"] * (len(PROCESSES) + 2)))
    for model in MODELS:
        sizes = [needed(model, 1, 0), *(needed(model, n, 3) for n in PROCESSES[1:])]
        sizes.append(needed_in_4_bits(model))
        print(row([model.name, *(f"{size / 1e9:.1f}" for size in sizes)]))
    print()
    print(row(["GPUs needed", *(f"{size} GB" for size in GPUS)]))
    print(row(["---"] * (len(GPUS) + 1)))
    for model in MODELS:
        print(row([model.name, *(fewest(model, size) for size in GPUS)]))


if __name__ == "__main__":
    main()
