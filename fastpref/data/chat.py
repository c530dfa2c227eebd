"""Conversations -> text by the tokenizer's chat template, by the rules of TRL's DPOTrainer.

The rules (trl 1.16, trainer/dpo_trainer.py, `_prepare_dataset`): the prompt is rendered with
``add_generation_prompt=True``, prompt + chosen and prompt + rejected as whole conversations, all
three with the row's `tools` and `chat_template_kwargs`; the texts are then tokenised without adding
special tokens, because the template writes them.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.data.badrows import Unusable, Words

ERROR_LIMIT = 200  # characters shown of what a template says
# Arguments of transformers' `apply_chat_template` that are no variables of a template.
NOT_VARIABLES = frozenset(
    "conversation tools chat_template add_generation_prompt continue_final_message tokenize "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs sanitize_control_tokens".split()
)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")


def read_template(name: str) -> str:
    """The template that the option `chat_template` names: a file's text, or the text itself.

    Raises ValueError for a name that is neither a readable file nor a Jinja template.
    """
    try:
        if Path(name).expanduser().is_file():
            return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template {name}: not UTF-8 text: {error}") from None
    except (OSError, ValueError):  # a text may be too long for a file name, or hold a zero
        pass
    if "{{" in name or "{%" in name:
        return name
    raise ValueError(
        f"chat_template: {name[:80]!r} is no file, and as a template it would write nothing (it "
        "has no {{ or {%). Name a Jinja file, or give the template's text."
    )


def dated(template: str, day: datetime.date) -> str:
    """``template`` with today's date, which some ask for by `strftime_now("...")`, set to ``day``.

    Token ids would otherwise change from one day to the next, and a resumed run with them.
    """
    return _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), template)


class Chat:
    """Renders conversations; `state` is what decides the texts besides them.

    Raises ValueError for a tokenizer without a chat template, and for a template with an error of
    syntax. ``day`` is the date that templates get which ask for today's.
    """

    def __init__(self, tokenizer: Any, day: datetime.date) -> None:
        self.tokenizer = tokenizer
        # Tokenizers that render by other means than a Jinja template take none.
        self.own_way = not renders_by_jinja(tokenizer)
        named = getattr(tokenizer, "chat_template", None)
        if not named and not self.own_way:
            raise ValueError(
                "the data holds conversations, but the tokenizer has no chat template. Set "
                "chat_template to a Jinja file (or the text of a template), or choose a model "
                "whose tokenizer has one."
            )
        self.templates: dict[str, str] = named if isinstance(named, dict) else {"": named or ""}
        if not self.own_way:
            self.templates = {name: dated(text, day) for name, text in self.templates.items()}
            if not self.templates.keys() & {"", "default"}:
                raise ValueError(
                    "the tokenizer has several chat templates and none called 'default' "
                    f"({', '.join(sorted(self.templates))}). Set chat_template to a Jinja file."
                )
            for name in self.templates:
                self._check_syntax(name)

    def texts(
        self,
        prompt: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        tools: Sequence[Any] | None,
        variables: dict[str, Any] | None,
    ) -> list[str]:
        """The texts of the prompt and of the prompt with each of ``completions``.

        Raises Unusable where the template refuses them or fails.
        """
        taken = sorted(NOT_VARIABLES & (variables or {}).keys())
        if taken:
            raise Unusable(
                "chat_template_kwargs holds an argument of transformers, not a variable of the "
                "template",
                taken[0],
            )
        given = {"tools": None if tools is None else list(tools), **(variables or {})}
        if not self.own_way:
            use = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
            given["chat_template"] = self.templates.get("") or self.templates[use]
        texts = [self._render("the prompt", prompt, given, add_generation_prompt=True)]
        for completion in completions:
            texts.append(self._render("prompt + completion", [*prompt, *completion], given))
        return texts

    def state(self) -> dict[str, Any]:
        """What decides the texts, as JSON values."""
        return {"templates": self.templates, "special": self.tokenizer.special_tokens_map}

    def _render(self, what: str, messages: Sequence[Any], given: Any, **options: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, **given, **options
            )
        except Exception as error:  # a template can raise whatever Python can
            said = " ".join(str(error).split())
            raise Unusable(
                f"the chat template fails on {what}",
                Words(f"{type(error).__name__}: {said[:ERROR_LIMIT]}"),
            ) from None
        return str(text)

    def _check_syntax(self, name: str) -> None:
        from jinja2 import TemplateSyntaxError

        probe = [{"role": "user", "content": "-"}]
        try:
            self.tokenizer.apply_chat_template(
                probe, tokenize=False, chat_template=self.templates[name]
            )
        except TemplateSyntaxError as error:
            called = f" {name!r}" if name else ""
            raise ValueError(
                f"the chat template{called} is not valid Jinja: line {error.lineno}: "
                f"{error.message}. Correct it, or set chat_template to another one."
            ) from None
        except Exception:  # this conversation may be one that it refuses
            pass


def renders_by_jinja(tokenizer: Any) -> bool:
    """Whether its conversations are rendered by transformers' own function and a template."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


def asks_for_date(tokenizer: Any) -> bool:
    """Whether a template of the tokenizer writes today's date."""
    named = getattr(tokenizer, "chat_template", None) or ""
    return "strftime_now" in json.dumps(named)
