"""Your own masked language model, from raw text to filled masks: prepare, pretrain, predict.

    python examples/language_model.py [TEXT …] [--language en|zh] [--minutes 3] [--out DIR]

TEXT are files whose documents are separated by empty lines, .jsonl with a column `text`, plain or .gz/.xz. Without any,
English prose that ships with Python is used (465 kB): enough to see every step work, too little to learn much.

Time: the given minutes and a few seconds. What to expect on two cores with AVX512 and bfloat16 products: from Python's
own prose in 3 minutes a loss on held-out text near 3.4 nats, 44 % of the masked words right, and words of that prose in
the gap; slower cores get less far. Chinese takes a byte-level BPE, English a WordPiece vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import effllm

LANGUAGES = {
    "en": (
        effllm.PrepareSettings(tokenizer="wordpiece", vocab_size=3072),
        ("The function returns a [MASK] object.", "This is the [MASK] of the class."),
    ),
    "zh": (effllm.PrepareSettings(tokenizer="bpe", vocab_size=8192), ("北京是中国的[MASK]都。", "他出生于[MASK]年。")),
}


def python_prose(file: Path) -> Path:
    """Write the language reference that ships with Python, a document per paragraph."""
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file


def main() -> None:
    """Prepare, pre-train, fill masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT")
    parser.add_argument("--language", choices=LANGUAGES, default="en")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("language-model"))
    arguments = parser.parse_args()
    out = arguments.out
    if out.exists():
        parser.error(f"{out} exists; choose another --out")
    out.mkdir(parents=True)
    preparation, sentences = LANGUAGES[arguments.language]
    texts = arguments.texts or [python_prose(out / "python.txt")]

    tokens = effllm.prepare(texts, out / "tokens", settings=preparation)
    print(f"tokens: {tokens.manifest['report']['kept']}")

    settings = effllm.PretrainSettings(
        model="modern-tiny",
        seconds=60 * arguments.minutes,
        batch_size=32,
        learning_rate=2e-3,
        mask_rate=0.2,
        log_every=50,
    )
    for step in effllm.pretrain(out / "tokens", out / "run", settings):
        if step.step % settings.log_every == 0:
            print(f"step {step.step}  loss {step.loss:.3f}  {step.tokens / step.step_s:,.0f} tokens/s", flush=True)

    for row in effllm.Variant.open((out / "run" / "last").resolve()).rows:
        print(f"{row.metric} on held-out text: {row.value:.3f} {row.unit}")
    model = effllm.open(out / "run" / "last")
    for sentence in sentences:
        for mask in model.predict(sentence)["masks"]:
            found = ", ".join(f"{c['token']} {c['score']:.2f}" for c in mask["candidates"][:5])
            print(f"{sentence}\n  {found}")
    print(f"the run's curves are in {out / 'run' / 'report.html'}")


if __name__ == "__main__":
    main()
