"""The table of docs/methods.md has every method, with the number of parameters that it trains."""

import re
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from ssmtune.methods import METHODS, apply_method
from ssmtune.mixers import patch
from ssmtune.weights import parameter_counts

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
# L layers, hidden size d, D channels, N states, rank R of the time step, filters of K, V tokens: no two alike.
SIZES = {"L": 3, "d": 120, "D": 240, "N": 18, "R": 7, "K": 4, "V": 97}


def rows() -> dict[str, list[str]]:
    """The cells of the table, by the method's name."""
    lines = PAGE.read_text(encoding="utf-8").split("| method | `--methods` |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 5 and all(row) for row in cells)
    return {row[1].strip("`"): row for row in cells}


def value(formula: str) -> int:
    """`L·k·D, k = 8` with the sizes above; a share is rounded and at least one."""
    expression, *letters = formula.split(", ")
    known = dict(SIZES)
    for letter in letters:
        name, _, text = letter.partition(" = ")
        known[name] = max(1, round(arithmetic(text, known)))
    return arithmetic(expression, known)


def arithmetic(text: str, known: dict[str, int]) -> float:
    assert re.fullmatch(r"[\w·+/() ]+", text), text
    return eval(text.replace("·", "*"), {"__builtins__": {}}, known)  # noqa: S307 - of our own page, letters and + * / alone


def test_it_has_every_method():
    assert sorted(rows()) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_parameters(name):
    with torch.device("meta"):
        model = MambaForCausalLM(
            MambaConfig(
                vocab_size=SIZES["V"],
                hidden_size=SIZES["d"],
                num_hidden_layers=SIZES["L"],
                state_size=SIZES["N"],
                time_step_rank=SIZES["R"],
                conv_kernel=SIZES["K"],
            )
        )
    patch(model)
    assert parameter_counts(apply_method(model, name))[0] == value(rows()[name][3])
