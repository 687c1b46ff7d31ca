"""Text to tokens and back, in the launcher process: no torch, no transformers.

`Tokenizer` encodes, decodes and renders chats as transformers' `AutoTokenizer` does, from a prepared
folder (`memserve.model.prepared`) that was compared with it. `Detokenizer` turns one choice's tokens
into text as they come; `StopChecker` finds stop strings in that text. Both hold back what may still
change, and give it up at `flush`.

Cleaning up spaces after decoding (`clean_up_tokenization_spaces`) is not done.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from memserve.chat_template import ChatTemplate, Message
from memserve.errors import InvalidRequest, UsageError
from memserve.model.prepared import PreparedModel

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not UTF-8, an unfinished character among them."""


class Tokenizer:
    """The tokenizer and chat template of a prepared model.

    `chat_template` replaces the model's own template. Safe to use from several threads.
    """

    def __init__(self, prepared: PreparedModel, *, chat_template: str | None = None) -> None:
        self._backend: Any = tokenizers.Tokenizer.from_file(str(prepared.tokenizer_file))
        self._special_tokens = prepared.special_tokens
        own = prepared.chat_template() if chat_template is None else chat_template
        for_tools = prepared.chat_template(tools=True) if chat_template is None else chat_template
        self._template = self._compile(own)
        self._template_for_tools = self._template if for_tools == own else self._compile(for_tools)
        self.tool_template = for_tools
        """Source of the template for chats with tools; None: there is none."""
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        """Ids that `skip_special_tokens` leaves out of decoded text."""
        self._added = {token.content: token_id for token_id, token in added.items()}
        self._splitter, self._splitting = _splitter(list(added.values()))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used without a template of the caller's."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens that stand in the text become their ids.

        `add_special_tokens` lets the tokenizer add what it adds to plain text (a BOS token, say); a
        rendered chat has it already.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids that the tokenizer doesn't know are left out."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def boundaries(self, text: str) -> list[int]:
        """Where `text` may be cut in two whose encodings, joined, are its own; ascending.

        Encoding cuts a text at its added tokens first, and treats the parts one by one: these are
        the places where such a token begins. `add_special_tokens` must be false.
        """
        if self._splitter is None:
            return []
        return [
            match.start()
            for match in self._splitter.finditer(text)
            if match.group() in self._splitting and match.start()
        ]

    def added_token_id(self, text: str) -> int | None:
        """The token that always stands for this very text; None: there is none."""
        return self._added.get(text)

    def token_text(self, token_id: int) -> str:
        """The token's own spelling in the vocabulary, or the empty string for an unknown id."""
        return self._backend.id_to_token(token_id) or ""

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat; see `ChatTemplate.render`. Encode it without adding special tokens.

        `template` is used instead of the model's. Raises `InvalidRequest`, also when there is none.
        """
        if template is not None:
            compiled: ChatTemplate | None = self._compile_given(template)
        else:
            compiled = self._template if tools is None else self._template_for_tools
        if compiled is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE",
                code="no_chat_template",
            )
        return compiled.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def _compile(self, source: str | None) -> ChatTemplate | None:
        return None if source is None else ChatTemplate(source, self._special_tokens)

    def _compile_given(self, source: str) -> ChatTemplate:
        try:
            return _compile_cached(source, tuple(sorted(self._special_tokens.items())))
        except UsageError as error:
            raise InvalidRequest(str(error), param="chat_template") from error


def _splitter(added: Sequence[Any]) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """Finds the tokens that split a text as it stands, and those before which a cut is exact.

    Tokens that are looked for in normalised text don't reach over the others. One that takes the
    space before it too does not begin where its text does. Whether one that must stand as a word of
    its own is found depends on what is around it: a tokenizer with such gets no cuts.
    """
    found = [token for token in added if not token.normalized and token.content]
    if not found or any(token.single_word for token in found):
        return None, frozenset()
    # Of two that begin at the same character the longer one is taken.
    contents = sorted((token.content for token in found), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, contents)))
    return pattern, frozenset(token.content for token in found if not token.lstrip)


@functools.lru_cache(maxsize=16)
def _compile_cached(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


class Detokenizer:
    """Text of one choice's tokens as they come.

    The pieces that `push` and `flush` return, joined, are `decode` of all tokens. A character whose
    bytes come in several tokens is held back until it is whole. (Exceptions, all of them bytes that
    are no UTF-8: the number of replacement characters may differ.)

    How: tokens are decoded together with the ones of the piece before them, since a decoder may
    treat the first token of a text in its own way (SentencePiece drops its space); what the earlier
    ones decode to is cut off the front.
    """

    MAX_PENDING = 16
    """Tokens without a whole character after which the text can't be UTF-8 and is given up."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the last piece's tokens, then the pending ones
        self._num_done = 0  # how many of them are the last piece's
        self._done_text = ""  # what those decode to

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) > len(self._done_text) and not text.endswith(REPLACEMENT):
            return self._advance(text, len(self._window))
        if len(self._window) - self._num_done > self.MAX_PENDING:
            # The last three tokens may be the beginning of a character: it has four bytes at most.
            cut = len(self._window) - 3
            return self._advance(self._decode(self._window[:cut]), cut)
        return ""

    def flush(self) -> str:
        """What was held back; an unfinished character shows as U+FFFD. Ends the text."""
        return self._advance(self._decode(self._window), len(self._window))

    def _advance(self, text: str, end: int) -> str:
        """Give out what `text`, the decoding of the window up to `end`, has more than before."""
        piece = text[len(self._done_text) :]
        self._window = self._window[self._num_done :]
        self._num_done = end - self._num_done
        self._done_text = self._decode(self._window[: self._num_done])
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopChecker:
    """Ends a text at the stop string that is complete first, wherever the pieces are cut.

    Of two that are complete at the same character, the longer one counts. Text that may be the
    beginning of a stop string is held back. `include_in_output` leaves the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        assert all(stops), "a stop string must not be empty"
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to emit now and the stop string that has ended the text, if one has."""
        assert not self._matched, "the text has ended"
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._matched = True
            self._held = ""
            return text[: end if self._include else start], stop
        kept = self._num_held(text)
        emitted, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return emitted, None

    def flush(self) -> str:
        """What was held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
