"""What the check scripts share: read a plan, answer its cases, print the answers. Standard library only.

It is imported in environments that have neither effllm nor its version of Python's packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def answer_plan(answer: Answer, packages: Sequence[str]) -> None:
    """Answer each case of the plan named on the command line and print one line of JSON.

    A case that raises is reported as its error, with the traceback on stderr; the others go on.
    """
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            results.append({"case": case["name"], **answer(case)})
        except Exception as error:  # whatever the tool raises is the finding
            traceback.print_exc()
            results.append({"case": case["name"], "error": f"{type(error).__name__}: {error}"})
    print(json.dumps({"versions": {package: _version(package) for package in packages}, "results": results}))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
