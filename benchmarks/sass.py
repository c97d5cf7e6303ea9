"""What a compiled GPU kernel costs, read from its cubin: registers, memory, spills, and the instructions of its loops.

    kernel = sass.read("scan.cubin", "selective_scan_fwd_kernel")
    for loop in kernel.innermost:
        print(loop.instructions, loop.count("MUFU"))

The tools are those of CUDA (nvdisasm and cuobjdump on the PATH), or those that come with triton.
"""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.\w+)\)")


@dataclass(frozen=True)
class Loop:
    """A loop, without the loops inside of it.

    Attributes:
        address: where its first instruction is.
        depth: how many loops it is in, itself counted.
        innermost: whether no loop is inside of it.
        opcodes: how often one iteration issues each opcode on the longest way through. Bodies of called functions are
            left out; instructions that a predicate switches off are not.
    """

    address: int
    depth: int
    innermost: bool
    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        """Those of one iteration."""
        return self.opcodes.total()

    def count(self, prefix: str) -> int:
        """Instructions of one iteration by the beginning of their names: "MUFU" or "MUFU.EX2"."""
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(f"{prefix}."))


@dataclass(frozen=True)
class Kernel:
    """A kernel of a cubin.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of a block that are known before the launch, with those that the system reserves.
        spills: instructions that access local memory.
        instructions: all of its code, called functions included.
        products: those of the matrix units among them.
        loops: in the order of their addresses.
    """

    name: str
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    products: int
    loops: tuple[Loop, ...]

    @property
    def innermost(self) -> tuple[Loop, ...]:
        """The loops with no loop inside."""
        return tuple(loop for loop in self.loops if loop.innermost)


def read(cubin: str | Path, kernel: str) -> Kernel:
    """Read a kernel of a cubin by its name, or by a part of the name that no other kernel has: C++ names are mangled.

    Raises:
        ValueError: there is no such kernel, or there are several.
        FileNotFoundError: the tools are not there.
    """
    usage = _run("cuobjdump", "-res-usage", cubin)
    found = dict(re.findall(r"Function (\S+):\s+(REG:.*)", usage))
    names = [name for name in found if name == kernel] or [name for name in found if kernel in name]
    if len(names) != 1:
        raise ValueError(
            f"{cubin} has {len(names) or 'no'} kernels named {kernel!r}.\n"
            f"  It holds {', '.join(found) or 'none'}. Pass a name, or a part of one, that fits one of them."
        )
    (name,) = names
    resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", found[name])}
    program = _Program(_section(_disassembly(cubin, usage), name))
    return Kernel(
        name,
        resources["REG"],
        resources["STACK"],
        resources["SHARED"],
        sum(bool(re.match(r"(LDL|STL)\b", instruction.opcode)) for instruction in program.instructions),
        len(program.instructions),
        # HMMA, HGMMA, UTCHMMA, ...
        sum(instruction.opcode.partition(".")[0].endswith("MMA") for instruction in program.instructions),
        program.loops(),
    )


def tool(name: str) -> str:
    """Find nvdisasm or cuobjdump."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    found = shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)
    if found is None:
        raise FileNotFoundError(
            f"{name} is neither on the PATH nor in triton.\n"
            "  Cubins are read with the tools of CUDA. Install CUDA, or pip install triton."
        )
    return found


def _run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{name} cannot read {arguments[-1]}:\n  {done.stderr.strip()}")
    return done.stdout


# whoever counts reads the kernels of a cubin one after the other; another cubin in the place of one has other resources
@lru_cache(maxsize=1)
def _disassembly(cubin: str | Path, usage: str) -> str:
    return _run("nvdisasm", "-c", cubin)


def _section(disassembly: str, name: str) -> str:
    sections = re.split(r"^//-+ (\S+) +-+$", disassembly, flags=re.MULTILINE)
    return sections[sections.index(f".text.{name}") + 1]


@dataclass(frozen=True)
class _Instruction:
    address: int
    opcode: str
    target: str | None
    falls_through: bool


class _Program:
    """The instructions of a kernel, its basic blocks, and the ways between them."""

    def __init__(self, listing: str):
        self.instructions: list[_Instruction] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            label = re.match(r"(\.L\w+):", line)
            if label:
                labels[label[1]] = len(self.instructions)
            match = _INSTRUCTION.search(line)
            # what fills up the section after the last instruction
            if match and match[3] != "NOP":
                self.instructions.append(_parse(match))
        self.blocks, self.successors = self._graph(labels)

    def _graph(self, labels: dict[str, int]) -> tuple[list[range], list[list[int]]]:
        last = len(self.instructions)
        ends = [i + 1 for i, x in enumerate(self.instructions) if x.target or not x.falls_through]
        starts = sorted({0, *labels.values(), *ends} - {last})
        blocks = [range(start, stop) for start, stop in zip(starts, [*starts[1:], last], strict=True)]
        index = {start: i for i, start in enumerate(starts)}
        successors = []
        for block in blocks:
            end = self.instructions[block[-1]]
            ways = [index[labels[end.target]]] if end.target and labels[end.target] < last else []
            if end.falls_through and block.stop < last:
                ways.append(index[block.stop])
            successors.append(ways)
        return blocks, successors

    def loops(self) -> tuple[Loop, ...]:
        """Natural loops; those that jump back to the same place are one."""
        dominators = _dominators(self.successors)
        back = {(i, j) for i, above in dominators.items() for j in self.successors[i] if j in above}
        bodies = {head: self._body(head, {i for i, j in back if j == head}) for _, head in back}
        loops = []
        for head, body in sorted(bodies.items()):
            inner = [other for start, other in bodies.items() if start != head and start in body]
            own = body.difference(*inner)
            depth = sum(head in other for other in bodies.values())
            opcodes = self._longest(head, body, own, back)
            loops.append(Loop(self.instructions[self.blocks[head].start].address, depth, not inner, opcodes))
        return tuple(loops)

    def _body(self, head: int, tails: set[int]) -> set[int]:
        body, todo = {head}, list(tails)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += [i for i, ways in enumerate(self.successors) if block in ways]
        return body

    def _longest(self, head: int, body: set[int], own: set[int], back: set[tuple[int, int]]) -> Counter[str]:
        """The opcodes on the longest way from the head back to it, of the loop's own blocks."""
        known: dict[int, Counter[str] | None] = {}

        def walk(block: int) -> Counter[str] | None:
            if block not in known:
                ways = [j for j in self.successors[block] if j in body and (block, j) not in back]
                rests = [rest for rest in map(walk, ways) if rest is not None]
                if (block, head) in back:
                    rests.append(Counter())
                here = Counter(self.instructions[i].opcode for i in self.blocks[block]) if block in own else Counter()
                known[block] = max((here + rest for rest in rests), key=Counter.total, default=None)
            return known[block]

        return walk(head) or Counter()


def _parse(match: re.Match[str]) -> _Instruction:
    address, predicate, opcode, operands = match.groups()
    target = _TARGET.search(operands)
    base = opcode.partition(".")[0]
    # the way of threads that have diverged, which leads back to the next instruction, is no way of the program
    jumps = base in ("BRA", "JMP") and not opcode.startswith("BRA.DIV") and target is not None
    # "@P0 BRA", "BRA.U UP0," and "@P0 EXIT" may go on
    conditional = predicate is not None or (jumps and not operands.startswith("`"))
    ends = base in ("EXIT", "RET", "BRX", "JMX") or jumps
    return _Instruction(int(address, 16), opcode, target[1] if jumps else None, conditional or not ends)


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks on every way to it."""
    reached, todo = {0}, [0]
    while todo:
        for block in successors[todo.pop()]:
            if block not in reached:
                reached.add(block)
                todo.append(block)
    before = {block: [i for i in reached if block in successors[i]] for block in reached}
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[i] for i in before[block])) | {block}
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators
