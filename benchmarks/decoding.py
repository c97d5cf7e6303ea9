"""Times decoding one token at a time: one step of the recurrence, and whole models in tokens per second.

`python -m benchmarks.decoding` measures ssmtune against transformers and appends its rows to
benchmarks/results/<device>.csv.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import ssmtune
from benchmarks import results
from benchmarks.call_cases import CallCase
from benchmarks.measure import Disagreement, Summary, interleave, verify

OP = "decoding"
STEPS = ((1, 1536), (1, 512), (8, 1536))
"""(batch, dim) of one step: the widths of Mamba-130m and of the shipped model."""

DSTATE = 16
PROMPT, NEW_TOKENS = 16, 64
REPEATS = 200
"""Steps in one timed run: a single one is shorter than a clock can tell."""


def _step_inputs(batch: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "state": random(batch, dim, DSTATE),
        "x": random(batch, dim),
        "dt": random(batch, dim) - 3,
        "A": -torch.arange(1, DSTATE + 1).float().repeat(dim, 1),
        "B": random(batch, DSTATE),
        "C": random(batch, DSTATE),
        "D": random(dim),
        "z": random(batch, dim),
        "dt_bias": 0.1 * random(dim),
    }


def step_calls(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[int], Tensor]]:
    """One decoding step by each implementation, as a function of how often it is taken from the same state."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    inputs = {name: value.to(dtype) for name, value in _step_inputs(batch, dim).items()}

    def repeated(step: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        def call(times: int) -> Tensor:
            state = inputs["state"].clone()
            arguments = {name: value for name, value in inputs.items() if name not in ("state", "x")}
            for _ in range(times):
                out = step(state, inputs["x"], dt_softplus=True, **arguments)
            return torch.cat([out.flatten(), state.flatten()])

        return call

    return {"cpu": repeated(ssmtune.selective_state_update), "transformers": repeated(mamba_selective_state_update)}


def models(name: str) -> dict[str, nn.Module]:
    """The model with ssmtune's operators, and as transformers has it."""
    from ssmtune.models import load_model

    patched, plain = load_model(name)[0].eval(), load_model(name)[0].eval()
    ssmtune.patch(patched)
    ssmtune.unpatch(plain)
    return {"cpu": patched, "transformers": plain}


def decode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Greedy decoding of NEW_TOKENS tokens."""
    with torch.no_grad():
        return model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip


class Session:
    """Collects and prints the rows of one run."""

    def __init__(self, environment: results.Environment, threads: int, seconds: float):
        self.environment, self.threads, self.seconds = environment, threads, seconds
        self.rows: list[results.Row] = []

    def step(self, batch: int, dim: int) -> None:
        """One step of the recurrence, held to the same in float64."""
        right = step_calls(batch, dim, torch.float64)["cpu"](3)
        calls = step_calls(batch, dim)
        verified = [
            verify(CallCase(f"{name} step of {(batch, dim)}", lambda call=call: call(3)), {"out": right})
            for name, call in calls.items()
        ]
        for entry, call in zip(verified, calls.values(), strict=True):
            entry.case.call = lambda call=call: call(REPEATS)
        for name, sample in zip(calls, interleave(verified, self.seconds), strict=True):
            wall = sample.summary("total", "wall")
            each = Summary(*(1e3 * value / REPEATS for value in (wall.median, wall.p20, wall.p80)))
            self._add(name, batch, dim, "selective_state_update", "wall time", "us", each)

    def model(self, name: str, batch: int) -> None:
        """Whole-model decoding: the same tokens from both, then tokens per second."""
        both = models(name)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, both["cpu"].config.vocab_size, (batch, PROMPT), generator=generator)
        answers = {backend: decode(model, tokens) for backend, model in both.items()}
        if not torch.equal(answers["cpu"], answers["transformers"]):
            raise Disagreement(f"{name}: ssmtune and transformers decode different tokens from the same prompt.")
        verified = [
            verify(CallCase(f"{backend} decodes", lambda model=model: decode(model, tokens).double()), {})
            for backend, model in both.items()
        ]
        for backend, sample in zip(both, interleave(verified, self.seconds, most=10), strict=True):
            wall = sample.summary("total", "wall")
            count = 1e3 * batch * NEW_TOKENS
            rate = Summary(count / wall.median, count / wall.p80, count / wall.p20)
            width = both[backend].config.hidden_size
            self._add(backend, batch, width, f"generate {name}", "throughput", "tokens/s", rate)

    def _add(
        self, backend: str, batch: int, dim: int, variant: str, metric: str, unit: str, value: Summary
    ) -> None:
        self.rows.append(
            self.environment.row(
                value, op=OP, pass_="fwd", backend=backend, dtype="float32", batch=batch, dim=dim, seqlen=1,
                dstate=DSTATE, threads=self.threads, variant=variant, metric=metric, unit=unit,
            )
        )  # fmt: skip
        print(
            f"  ({batch}, {dim})  {backend:14}{variant:26}{value.median:10.1f} {unit}"
            f"  ({value.p20:.1f} to {value.p80:.1f})",
            flush=True,
        )


def run(quick: bool = False, csv: Path | None = None) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: the smallest step and model only, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    environment = results.environment()
    threads = min(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    print(environment, f"{threads} threads", sep=" · ")
    session = Session(environment, threads, 0.3 if quick else 4.0)
    try:
        for batch, dim in STEPS[1:2] if quick else STEPS:
            session.step(batch, dim)
        for batch in (1,) if quick else (1, 8):
            session.model("mamba-5m", batch)
    except Disagreement as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    results.store(environment, session.rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
