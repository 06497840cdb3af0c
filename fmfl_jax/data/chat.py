"""Chat templates: the text that a checkpoint's authors made of a conversation, by the template they ship with it."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template in jinja and the names of special tokens in it ({"bos_token": "<s>", ...})."""

    source: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of messages [{"role": "system" | "user" | "assistant", "content": text}, ...].

        Special tokens are in it as text, bos too where the template puts one. add_generation_prompt opens the
        assistant's answer. What templates may use is what transformers' apply_chat_template gives them; they are a
        stranger's code, so they run in jinja's sandbox.

        Raises ValueError for what the template refuses, or where it is no template.
        """
        import jinja2
        import jinja2.sandbox

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            template = environment.from_string(self.source)
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as e:
            raise ValueError(f"the chat template refuses this conversation: {e}") from e


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own tojson escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
