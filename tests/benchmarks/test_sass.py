"""The instruction counter on a listing counted by hand, and on a kernel assembled here."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import sass

USAGE = "Function scan:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0\nFunction scanner:\n  REG:1 STACK:0 SHARED:0 LOCAL:0\n"
LISTING = """\
//--------------------- .text.scan                   --------------------------
.text.scan:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_outer:
        /*0020*/                   LDS R1, [R2] ;
.L_inner:
        /*0030*/                   MUFU.EX2 R3, R1 ;
        /*0040*/                   BRA.DIV UR4, `(.L_diverged) ;
        /*0050*/                   SHFL.BFLY PT, R4, R3, 0x1, 0x1f ;
.L_together:
        /*0060*/               @P1 BRA `(.L_long) ;
        /*0070*/                   FADD R5, R4, R5 ;
        /*0080*/                   BRA `(.L_joined) ;
.L_long:
        /*0090*/                   FFMA R5, R4, R3, R5 ;
        /*00a0*/                   STL [R1], R5 ;
        /*00b0*/                   CALL.REL.NOINC `($slow) ;
        /*00c0*/                   LDL R5, [R1] ;
.L_joined:
        /*00d0*/               @P2 FMUL R5, R5, R5 ;
        /*00e0*/                   BRA.U !UP0, `(.L_inner) ;
        /*00f0*/                   STG.E desc[UR8][R6.64], R5 ;
        /*0100*/               @P3 BRA `(.L_outer) ;
        /*0110*/                   EXIT ;
$slow:
        /*0120*/                   FMUL R7, R7, R7 ;
        /*0130*/                   RET.REL.NODEC R8 `(scan) ;
.L_diverged:
        /*0140*/                   NOP ;
        /*0150*/                   MUFU.RCP R9, R9 ;
        /*0160*/                   BRA `(.L_together) ;
.L_end:
        /*0170*/                   BRA `(.L_end);
        /*0180*/                   NOP;
//--------------------- .text.scanner                   --------------------------
.L_inner:
        /*0000*/                   EXIT ;
"""

PTX = """\
.version 7.8
.target sm_80
.address_size 64
.visible .entry nested(.param .u64 out, .param .u32 rows, .param .f32 start)
{
  .reg .pred %p<3>; .reg .b32 %r<6>; .reg .f32 %f<4>; .reg .b64 %d<3>;
  .shared .align 4 .b8 memory[512];
  ld.param.u64 %d1, [out]; ld.param.u32 %r1, [rows]; ld.param.f32 %f1, [start];
  cvta.to.global.u64 %d1, %d1;
  mov.u32 %r2, 0;
outer:
  mov.u32 %r3, 0;
inner:
  .pragma "nounroll";
  ex2.approx.ftz.f32 %f1, %f1; ex2.approx.ftz.f32 %f1, %f1; ex2.approx.ftz.f32 %f1, %f1;
  add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, %r1; @%p1 bra inner;
  st.global.f32 [%d1], %f1; add.u64 %d1, %d1, 4;
  add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r1; @%p2 bra outer;
  st.shared.f32 [memory], %f1;
  ret;
}
"""


@pytest.fixture
def listing(monkeypatch):
    monkeypatch.setattr(sass, "_run", lambda name, *_: {"cuobjdump": USAGE, "nvdisasm": LISTING}[name])


def test_counts_of_a_listing(listing):
    kernel = sass.read("scan.cubin", "scan")
    assert (kernel.name, kernel.registers, kernel.stack, kernel.shared) == ("scan", 40, 8, 1024)
    assert kernel.spills == 2
    outer, inner = kernel.loops
    # the longer of two ways, without the way of diverged threads
    assert inner.address == 0x30 and inner.depth == 2 and inner.innermost
    assert inner.instructions == 10 and inner.count("FADD") == 0
    assert inner.count("MUFU") == inner.count("MUFU.EX2") == 1 and inner.count("MUF") == 0
    assert outer.address == 0x20 and outer.depth == 1 and not outer.innermost
    assert dict(outer.opcodes) == {"LDS": 1, "STG.E": 1, "BRA": 1}
    assert kernel.innermost == (inner,)


def test_kernels_are_found_by_a_part_of_their_name(listing):
    assert sass.read("scan.cubin", "canne").name == "scanner"
    with pytest.raises(ValueError, match="has 2 kernels named 'sca'"):
        sass.read("scan.cubin", "sca")
    with pytest.raises(ValueError, match="has no kernels named 'conv'"):
        sass.read("scan.cubin", "conv")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_counts_of_an_assembled_kernel(capability, tmp_path):
    triton = find_spec("triton")
    if triton is None:
        pytest.skip("triton, which has an assembler, is not installed")
    bin = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    (tmp_path / "nested.ptx").write_text(PTX)
    assembler = bin / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    cubin = tmp_path / "nested.cubin"
    subprocess.run([assembler, f"-arch=sm_{capability}", tmp_path / "nested.ptx", "-o", cubin], check=True)
    kernel = sass.read(cubin, "nested")
    assert kernel.stack == kernel.spills == 0 and kernel.shared >= 512 and 0 < kernel.registers < 32
    outer, inner = kernel.loops
    assert inner.depth == 2 and inner.count("MUFU.EX2") == 3 and inner.count("STG") == 0
    assert 6 <= inner.instructions <= 8
    assert outer.count("STG") == 1 and outer.count("MUFU") == 0 and not outer.innermost


def test_a_file_that_is_no_cubin(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "text.cubin").write_text("no cubin")
    with pytest.raises(ValueError, match="cuobjdump cannot read"):
        sass.read(tmp_path / "text.cubin", "kernel")
