"""Runs the synthetic probes on small models trained here, and checks their known answers (docs/tasks.md).

    python -m benchmarks.probes                           a Llama and a Mamba, three seeds: 20 minutes on one thread
    python -m benchmarks.probes --parts mamba-changes     a part of it; the others can run at the same time
    python -m benchmarks.probes --results benchmarks/results/probes

Skills: an untrained model of each family learns recall, copy and swaps. Changes: a model that has learnt to sort is
moved to another style, and to another order, by every method. Each part is a comparison as `ssmtune compare` makes it,
in a directory of its own in --out; the report of all, and what came out of the known answers, goes to --results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from benchmarks.probe_answers import answers, table
from ssmtune.comparison import ComparisonConfig, run_comparison
from ssmtune.config import EvalConfig, TrainConfig
from ssmtune.mixers import find_mixers, patch
from ssmtune.models import no_progress_bars
from ssmtune.report import write_report
from ssmtune.sweep_progress import SweepProgress
from ssmtune.tasks.probes import WORDS, sorting_examples
from ssmtune.training import train

END = "<end>"
METHODS = {
    "llama": ["full", "lora", "prompt-tuning", "prefix-tuning"],
    "mamba": ["full", "lora", "prompt-tuning", "prefix-tuning", "initial-state", "state-offset", "state-offset-y"],
}
SWAPS_STEPS = {"llama": 1200, "mamba": 2000}  # a Mamba is at 86 % of two swaps after 1,200
PARTS = [f"{family}-{part}" for family in METHODS for part in ("skills", "changes")]


def new_model(family: str, seed: int = 0):
    """An untrained model of 0.13 M parameters, and a tokenizer with one token for each word of the probes."""
    words = [END, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    # 0.1 is the default of Mamba; that of Llama, 0.02, is for models many times as wide, and starts slowly
    shape = {"vocab_size": len(words), "hidden_size": 64, "tie_word_embeddings": True, "initializer_range": 0.1, **ends}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "llama":
            config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, **shape)
            model = LlamaForCausalLM(config)
        else:
            model = MambaForCausalLM(MambaConfig(num_hidden_layers=4, **shape))
    if find_mixers(model):
        patch(model)
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def save_model(family: str, place: Path, sorting_steps: int = 0) -> Path:
    """The directory of a new model, trained to sort for some steps; made where it is not there."""
    if not (place / "config.json").is_file():
        model, tokenizer = new_model(family)
        if sorting_steps:
            examples = sorting_examples(64 * sorting_steps)
            settings = TrainConfig(steps=sorting_steps, batch_size=64, lr=4e-3)
            never = EvalConfig(every=sorting_steps, samples=0)
            train(model, tokenizer, examples, examples[:64], settings, None, evaluation=never, progress=False)
        with no_progress_bars():
            model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def comparison(part: str, out: Path, seeds: int, scale: float) -> ComparisonConfig:
    """What is compared in a part; its model is made where it is not there."""
    family, kind = part.split("-")

    def steps(count: int) -> int:
        return max(1, round(count * scale))

    if kind == "skills":
        return ComparisonConfig(
            model=str(save_model(family, out / "models" / family)),
            tasks=["probe-recall", "probe-copy", "probe-swaps"],
            methods=["full"],
            seeds=seeds,
            steps=steps(800),
            task_steps={"probe-copy": steps(400), "probe-swaps": steps(SWAPS_STEPS[family])},
            lr_factors=[8.0],
            batch_size=32,
            evaluations=3,
            measures=[],
        )
    return ComparisonConfig(
        model=str(save_model(family, out / "models" / f"{family}-sorter", steps(400))),
        tasks=["probe-style", "probe-order"],
        methods=METHODS[family],
        seeds=seeds,
        steps=steps(200),
        task_steps={"probe-order": steps(300)},
        search_steps=steps(50),
        lr_factors=[8.0, 64.0],
        search_seeds=1,
        batch_size=16,
        evaluations=2,
        measures=[],  # their words are no text to a model of the probes
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/probes", metavar="DIR", help="models and comparisons (%(default)s)")
    parser.add_argument("--results", metavar="DIR", help="where the report goes (default: --out)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,P", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps (%(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    for part in args.parts.split(","):
        config = comparison(part, out, args.seeds, args.scale)
        run_comparison(config, out / part, progress=SweepProgress())
    finished = [out / part for part in PARTS if (out / part / "comparison.json").is_file()]
    results = Path(args.results or out)
    report = write_report(finished, results)
    found = answers(report.studies)
    text = table(found)
    (results / "answers.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"report   {report.markdown}, {report.html}")
    return 0 if all(answer.holds for answer in found) else 1


if __name__ == "__main__":
    sys.exit(main())
