"""Write constraints.txt: the versions in this environment, one `name==version` a line, markers where needed.

A constraints file pins what is installed and installs nothing by itself, so lines for another platform or Python do
no harm. Packages that the project did not bring (pip itself, an editable checkout) are left out.

What only another Python needs comes from reports of its pip, given as arguments; each is made by
`pip install --dry-run --ignore-installed --report FILE -c constraints.txt '.[notebooks,eval,cli,dev]'`.
"""

import json
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("notebooks", "eval", "cli", "dev")
# a package with binaries for one platform only, or needed by one Python only
LINUX = ("nvidia-", "cuda-", "triton")


def closure(root: str) -> dict[str, str]:
    """Name and version of everything the project with its extras needs, followed through installed metadata."""
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    todo = [(canonicalize_name(root), frozenset(EXTRAS))]
    seen: dict[str, set[str]] = {}
    while todo:
        name, extras = todo.pop()
        new = set(extras) - seen.get(name, set())
        if name not in installed or (name in seen and not new):
            continue
        seen.setdefault(name, set()).update(extras)
        for text in installed[name].requires or []:
            need = Requirement(text)
            marks = [default_environment() | {"extra": extra} for extra in ("", *extras)]
            if need.marker is None or any(need.marker.evaluate(m) for m in marks):
                todo.append((canonicalize_name(need.name), frozenset(need.extras)))
    return {name: installed[name].version.split("+")[0] for name in sorted(seen) if name != canonicalize_name(root)}


def main() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [
        f"# Versions with which the course was run (made on Python {python} by `make pins`).",
        "# pip install -c constraints.txt -e '.[notebooks,eval,cli,dev]'",
    ]
    pins = closure("prototypes_lib")
    markers = {name: ' ; sys_platform == "linux"' for name in pins if name.startswith(LINUX)}
    for path in sys.argv[1:]:
        report = json.loads(Path(path).read_text())
        for item in report["install"]:
            name = canonicalize_name(item["metadata"]["name"])
            if name not in pins and name != "prototypes-lib":
                pins[name] = item["metadata"]["version"].split("+")[0]
                markers[name] = f' ; python_version == "{report["environment"]["python_version"]}"'
    lines += [f"{name}=={pins[name]}{markers.get(name, '')}" for name in sorted(pins)]
    Path(__file__).parent.parent.joinpath("constraints.txt").write_text("\n".join(lines) + "\n")
    print(f"constraints.txt: {len(lines) - 2} versions")


if __name__ == "__main__":
    main()
