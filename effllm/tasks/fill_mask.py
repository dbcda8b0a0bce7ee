"""Fill-mask: the words that fit a masked place."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effllm.errors import SettingError
from effllm.tasks.task import Example, Head, Outputs, Task, softmax, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer

MASK = "[MASK]"
"""How a masked place is written in any text, whatever the model's own mask token is."""
EVALUATION_RATE = 0.15


class FillMask(Task):
    """Masked-language models. Any text is its own reference: 15 % of its tokens are masked and must be restored."""

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    architectures = ("ForMaskedLM", "ForPreTraining")
    outputs = ("logits",)
    batch_tokens = 512
    columns = {"text": "the text; masked by the evaluation where it holds no [MASK]"}
    metric = "masked accuracy"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `text`; its reference answer is the text itself."""
        return Example(text_column(record, "text"), gold=True)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the text.

        Where it is its own reference and holds no mask, 15 % of its tokens, a pure function of the text, are masked.
        """
        text = str(example.text)
        if tokenizer.mask_token is None or tokenizer.mask_id is None:
            raise SettingError("the model's tokenizer has no mask token")
        if MASK in text or tokenizer.mask_token in text:
            return [tokenizer.encode(text.replace(MASK, tokenizer.mask_token))]
        if example.gold is None:
            raise SettingError(f"there is no {MASK} in the text")
        encoding = tokenizer.encode(text)
        places = [i for i, special in enumerate(encoding.special) if not special]
        count = max(1, round(EVALUATION_RATE * len(places))) if places else 0
        chosen = random.Random(text).sample(places, count)
        ids = list(encoding.ids)
        for place in chosen:
            ids[place] = tokenizer.mask_id
        return [encoding.masked(ids, {place: encoding.ids[place] for place in chosen})]

    def condense(self, encoding: Encoding, outputs: Outputs) -> Outputs:
        """Return the logits at the masks alone, (masks, V): all of them would take gigabytes for a hundred texts."""
        return {"logits": outputs["logits"][encoding.mask_places]}

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return for each mask the five best `{"token", "id", "score"}`, and the best and true ids for scoring."""
        encoding = encodings[0]
        places = []
        for place, logits in zip(encoding.mask_places, outputs[0]["logits"], strict=True):
            best = logits.argsort()[::-1][:5]
            scores = softmax(logits)
            tokens = [int(token) for token in best]
            places.append(
                {
                    "candidates": [
                        {"token": encoding.token_text(token), "id": token, "score": float(scores[token])}
                        for token in tokens
                    ],
                    "id": int(best[0]),
                    "true_id": encoding.masked_ids.get(place),
                }
            )
        return {"masks": places}

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return for each mask whether the best token is the same."""
        return [float(a["id"] == b["id"]) for a, b in zip(first["masks"], second["masks"], strict=True)]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (masks restored, masks); nothing where the text came with its masks, whose words nobody knows."""
        scored = [m for m in answer["masks"] if m["true_id"] is not None]
        return (float(sum(m["id"] == m["true_id"] for m in scored)), float(len(scored))) if scored else ()

    def unlabelled(self, texts: Sequence[str], head: Head) -> list[Example]:
        """Make examples that are their own reference."""
        return [Example(text, gold=True) for text in texts]
