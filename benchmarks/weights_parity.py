"""The logits of every net of torchvision, timm and Transformers that the family has, against ours with the same weights.

    python benchmarks/weights_parity.py        about ten minutes; asked: within 1e-4 relative, fp32

Their net gets random weights and running statistics, its state goes through a file into ours, and two random images of an
odd and an even size go through both. A difference is relative to the largest value; the worst of the four stages and the
logits is printed beside that of the logits.
"""

import sys
from pathlib import Path

from measure import keep

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import peer
from tests.nets.peers import CASES, differences, loaded, make

SIZES = (64, 97)
SMOKE = (("torchvision", "resnet18"), ("timm", "resnet18d"), ("timm", "preact_resnet50"), ("transformers", "resnet18"))
ASKED = 1e-4

if __name__ == "__main__":
    lines, worst = [f"{'library':13}{'net here':22}{'names':13}{'logits':>10}{'any stage':>11}"], 0.0
    for library, row in SMOKE if "--smoke" in sys.argv else CASES:
        theirs = make(library, row)
        ours, told = loaded(theirs, row)
        found = [differences(theirs, ours, size) for size in SIZES]
        logits, any_stage = max(each["logits"] for each in found), max(max(each.values()) for each in found)
        lines.append(f"{library:13}{row:22}{told.dialect:13}{logits:10.1e}{any_stage:11.1e}")
        print(lines[-1], flush=True)
        worst = max(worst, any_stage)
    versions = ", ".join(f"{name} {peer(name).__version__}" for name in ("torchvision", "timm", "transformers"))
    lines.append(f"{len(lines) - 1} nets at {SIZES[0]} and {SIZES[1]} px, worst difference {worst:.1e}, asked {ASKED:.0e}; {versions}")
    keep("weights_parity", lines)
    sys.exit(worst > ASKED)
