"""Times decoding one token at a time: one step of the recurrence, and whole models in tokens per second.

`python -m benchmarks.decoding` measures ssmtune against transformers and appends its rows to
benchmarks/results/<device>.csv; with `--device cuda` on a GPU, against mamba_ssm's step where it is installed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import ssmtune
from benchmarks.stored import command_line, default_file, store
from ssmtune.measure import results
from ssmtune.measure.bounds import measure
from ssmtune.measure.call_cases import CallCase
from ssmtune.measure.inputs import Shape
from ssmtune.measure.session import Session
from ssmtune.measure.specs import available
from ssmtune.measure.timing import Disagreement, Summary, interleave, verify
from ssmtune.measure.update_cases import UpdateSpec, peers

OP = "decoding"
STEPS = {
    "cpu": (Shape(1, 1536, 1), Shape(1, 512, 1), Shape(8, 1536, 1), Shape(64, 1536, 1)),
    "cuda": (Shape(1, 1536, 1), Shape(1, 4096, 1), Shape(64, 1536, 1), Shape(64, 4096, 1), Shape(512, 4096, 1)),
}
"""One step: the widths of Mamba-130m, of Mamba-1.4b and of the shipped model."""

QUICK = Shape(1, 512, 1)
MANY_ROWS = 8
"""From this batch on, one adapter for all rows is compared with one of many for each."""

PROMPT, NEW_TOKENS = 16, 64


def steps(shapes: Sequence[Shape], backends: Sequence[str], device: str) -> list[list[UpdateSpec]]:
    """What is timed in turns with what."""
    half = ("bfloat16",) if device == "cuda" else ()
    groups = []
    for shape in shapes:
        adapters = [(), ("one-adapter",), ("64-adapters",)] if shape.batch >= MANY_ROWS else [()]
        specs = [UpdateSpec(shape, "fwd", name, (*half, *tags), device) for name in backends for tags in adapters]
        groups.append([*specs, *peers(shape, device, half)])
    return groups


def models(name: str, device: str = "cpu") -> dict[str, nn.Module]:
    """The model with ssmtune's operators, and as transformers has it."""
    from ssmtune.models import load_model

    patched, plain = (load_model(name)[0].eval().to(device) for _ in range(2))
    ssmtune.patch(patched)
    ssmtune.unpatch(plain)
    return {"ssmtune": patched, "transformers": plain}


def decode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Greedy decoding of NEW_TOKENS tokens."""
    with torch.no_grad():
        return model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip


def decode_models(session: Session, name: str, batch: int) -> None:
    """Whole-model decoding: the same tokens from both, then tokens per second on the clock of the host.

    Raises:
        Disagreement: the two decode different tokens.
    """
    both = models(name, session.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, both["ssmtune"].config.vocab_size, (batch, PROMPT), generator=generator)
    tokens = tokens.to(session.device)
    answers = {backend: decode(model, tokens) for backend, model in both.items()}
    if not torch.equal(answers["ssmtune"], answers["transformers"]):
        raise Disagreement(f"{name}: ssmtune and transformers decode different tokens from the same prompt.")
    verified = [
        # reading the tokens waits for the GPU
        verify(CallCase(f"{backend} decodes", lambda model=model: decode(model, tokens).cpu().double()), {})
        for backend, model in both.items()
    ]
    for backend, sample in zip(both, interleave(verified, session.seconds, most=10), strict=True):
        wall = sample.summary("total", "wall")
        count = 1e3 * batch * NEW_TOKENS
        rate = Summary(count / wall.median, count / wall.p80, count / wall.p20)
        session.rows.append(
            session.environment.row(
                rate, op=OP, pass_="fwd", backend=backend, dtype="float32", batch=batch,
                dim=both[backend].config.hidden_size, seqlen=1, dstate=both[backend].config.state_size,
                threads=max(session.threads), variant=f"generate {name}", metric="throughput", unit="tokens/s",
            )
        )  # fmt: skip
        print(f"  {name} x {batch}  {backend:14}{rate.median:10.1f} tokens/s  ({rate.p20:.1f} to {rate.p80:.1f})")
    session.store()


def run(
    quick: bool = False, csv: Path | None = None, device: str = "cpu", backends: Sequence[str] | None = None
) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: the smallest step and model only, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        device: cpu or cuda.
        backends: of ssmtune's step; all that are there by default.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    environment = results.environment(device)
    threads = min(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    print(environment)
    # on a GPU, whose check is stopped after its minutes, what is measured is kept as it comes
    path = csv or (None if quick else default_file(environment.device))
    as_it_comes = path if device == "cuda" else None
    seconds = 0.3 if quick else 2.0
    session = Session(environment, device, seconds, (threads,), as_it_comes, limits=measure(device))
    shapes = (QUICK,) if quick else STEPS[device]
    for group in steps(shapes, backends or available("selective_state_update", device), device):
        session.measure(group)
    try:
        for batch in (1,) if quick else (1, 8):
            decode_models(session, "mamba-5m", batch)
    except Disagreement as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    finally:
        if as_it_comes is None:
            store(environment, session.rows, quick, csv)
    return 1 if session.wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("decoding", __doc__, quick="the smallest sizes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
