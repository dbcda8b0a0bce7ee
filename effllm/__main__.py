"""`python -m effllm`."""

from effllm.cli import entry

entry()
