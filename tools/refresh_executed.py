"""Copy the executed notebooks of a course run into notebooks/executed, and the README's picture; `make executed`.

Only notebooks that ran to their end are in the output folder under their own name, so whatever is there is taken.
"""

import base64
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent / "notebooks"


def main(out: str) -> None:
    copies = sorted(Path(out).glob("[0-9][0-9]_*.ipynb"))
    copies = [p for p in copies if (HERE / f"{p.stem}.py").is_file()]
    if not copies:
        sys.exit(f"error: no executed notebook in {out}; run the course first")
    for copy in copies:
        shutil.copyfile(copy, HERE / "executed" / copy.name)
        print(f"notebooks/executed/{copy.name}")
        if copy.stem == "50_pretraining":
            picture(copy, HERE.parent / "docs" / "collapse.png")


def picture(copy: Path, target: Path) -> None:
    """The first figure of a notebook as a file."""
    outputs = [o for cell in json.loads(copy.read_text())["cells"] for o in cell.get("outputs", [])]
    first = next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(base64.b64decode("".join(first)))
    print(f"{target.parent.name}/{target.name}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
