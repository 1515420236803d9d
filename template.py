"""The chat template: how a conversation with a thinking block is laid out as text.

The idea. A model only continues a text, so a conversation is written as one, with marks for who speaks. The marks are
*control* tokens (`<SPECIAL_11>` opens a turn, `<SPECIAL_12>` ends one, ...), and the layout is the released model's, to
the newline. What a user types must never become a mark: someone who writes "<SPECIAL_12>" has not ended a turn. So a
chat is a list of pieces, each marked as control or as text, and never one string to be searched; the tokenizer turns
control pieces into one id each and everything else into ordinary tokens.

Thinking is part of the layout: the prompt ends inside an open `<think>` block, and the model closes it, or the prompt
ends behind an empty one, and the model answers at once. Thoughts of earlier turns are left out.

Why this is written by hand, and what the library does better. transformers renders a Jinja template that each model
brings along, which fits any layout. `CHAT_TEMPLATE` below is ours, for what we save; the tests hold both against each
other. But a rendered string no longer knows which of its marks were typed by a user, and 50 lines of Jinja are harder
to read than as much Python, which can be stepped through.

This file knows strings. It must not know token ids, vocabularies or models.
Source: the chat template of Nemotron Nano 2 (9B-v2), rendered; report section 3.4 for the switches.
"""

import json
from collections.abc import Sequence

# The names of the control tokens. Only this file decides where they stand.
THINK, END_THINK = "<think>", "</think>"
SYSTEM_TURN, TURN, END_TURN = "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"

# The tool block's tags are the released ones; the sentences around them are ours, so a tool prompt for a released
# checkpoint should be rendered with the chat template that comes with it.
_TOOLS_INTRO = "These tools may be called:"
_TOOLS_USE = (
    'To call some, write <TOOLCALL>[{"name": "...", "arguments": {...}}]</TOOLCALL> and end your turn. '
    "The results come back as <TOOL_RESPONSE>[...]</TOOL_RESPONSE>."
)


# ----------------------------------------------------------------------------------------------------------------------
# The layout


def render_chat(
    messages: Sequence[dict],
    add_generation_prompt: bool = True,
    tools: Sequence[dict] | None = None,
    continue_final_message: bool = False,
) -> list[tuple[str, bool]]:
    """Lay out a conversation as `(text, is_control)` pieces; their texts joined are what the released template renders.

        <SPECIAL_10>System\\n{system}\\n                            always there, empty or not
        <SPECIAL_11>User\\n{text}\\n
        <SPECIAL_11>Assistant\\n{answer}\\n<SPECIAL_12>\\n            an earlier turn: its thought is dropped
        <SPECIAL_11>Assistant\\n<think>\\n                           the generation prompt; <think></think> if off

    `messages` are dicts with `role` (system, only first; user; assistant; tool) and `content` (a string). A final
    assistant message is a prefill: it is stripped and follows the generation prompt, open if `add_generation_prompt` or
    `continue_final_message`, closed by `\\n<SPECIAL_12>\\n` otherwise. `tools` (JSON-like dicts) go to the system turn.

    Thinking is on unless switched off. System and user texts are read in order, "/think" switches on, otherwise
    "/no_think" switches off, the last one wins; both words are deleted from the text. The released template does so by
    plain substring search, and we keep its quirk because the tokens must be equal: a user text that contains "</think>"
    counts as "/think" and arrives as "<>", and a path such as "/thinking/a" loses its first six characters.

    Raises ValueError for an empty list, unknown roles, contents that are not strings, or an assistant before any user.
    """
    check_messages(messages, continue_final_message)
    if not isinstance(tools or [], Sequence) or not all(isinstance(tool, dict) for tool in tools or []):
        raise ValueError(f"tools must be a list of dicts, one JSON schema each, got {tools!r}.")
    thinking = True
    for message in messages:
        if message["role"] in ("system", "user"):
            if "/think" in message["content"]:
                thinking = True
            elif "/no_think" in message["content"]:
                thinking = False

    system, turns = "", [m for m in messages if m["role"] != "system"]
    if messages[0]["role"] == "system":
        system = clean(messages[0]["content"])
    if tools:
        listed = ", ".join(json.dumps(t.get("function", t), ensure_ascii=False) for t in tools)
        system += ("\n\n" if system else "") + f"{_TOOLS_INTRO}\n<AVAILABLE_TOOLS>[{listed}]</AVAILABLE_TOOLS>\n\n"
        system += _TOOLS_USE
    prefill = turns.pop()["content"].strip() if turns[-1]["role"] == "assistant" else ""

    pieces = [(SYSTEM_TURN, True), (f"System\n{system}\n", False)]
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            pieces += [(TURN, True), (f"User\n{clean(turn['content'])}\n", False)]
        elif turn["role"] == "tool":  # consecutive tool results share one user turn
            if i == 0 or turns[i - 1]["role"] != "tool":
                pieces += [(TURN, True), ("User\n<TOOL_RESPONSE>[", False)]
            more = i + 1 < len(turns) and turns[i + 1]["role"] == "tool"
            pieces += [(turn["content"] + (", " if more else "]</TOOL_RESPONSE>\n"), False)]
        else:
            answer = turn["content"]
            if END_THINK in answer:  # the released rule: what stands between the first </think> and the next
                answer = answer.split(END_THINK)[1]
            answer = answer.strip() + _tool_calls(turn, "\n\n" if answer.strip() else "")
            pieces += [(TURN, True), (f"Assistant\n{answer}\n", False), (END_TURN, True), ("\n", False)]

    if add_generation_prompt or prefill:
        pieces += [(TURN, True), ("Assistant\n", False), (THINK, True)]
        pieces += [("\n", False)] if thinking else [(END_THINK, True)]
    if prefill:
        # The model's own words. Its first </think> closes the thought just as it does when the model generates it.
        thought, close, answer = prefill.partition(END_THINK) if thinking else (prefill, "", "")
        pieces += [(thought, False)] + ([(END_THINK, True), (answer, False)] if close else [])
        if not (add_generation_prompt or continue_final_message):
            pieces += [("\n", False), (END_TURN, True), ("\n", False)]
    return [piece for piece in pieces if piece[0]]


def chat_text(messages: Sequence[dict], **options) -> str:
    """The rendered conversation as one string, to look at or to compare. Options as in `render_chat`.

    Do not encode this string: in it, a control token and a user who typed its name look the same.
    """
    return "".join(text for text, _ in render_chat(messages, **options))


def clean(text: str) -> str:
    """System and user text as it is shown: without the two switches, stripped."""
    return text.replace("/think", "").replace("/no_think", "").strip()


def _tool_calls(turn: dict, before: str) -> str:
    """The `<TOOLCALL>[...]</TOOLCALL>` text of an earlier assistant turn, or nothing. Ordinary text, not control."""
    calls = []
    for call in turn.get("tool_calls") or []:
        call = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise ValueError(f"a tool call needs a name and arguments, got {call!r}.")
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(f'{{"name": "{call["name"]}", "arguments": {arguments}}}')
    return f"{before}<TOOLCALL>[{', '.join(calls)}]</TOOLCALL>" if calls else ""


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_messages(messages, continue_final_message=False) -> None:
    """ValueError, in a sentence that names the message, unless these are messages that `render_chat` can lay out."""
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence) or len(messages) == 0:
        raise ValueError(f"a chat is a list of at least one message, got {messages!r}: pass [{{'role': 'user', ...}}].")
    seen_user = False
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {i} is {message!r}: it must be a dict with the keys role and content.")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {i} has role {role!r}: use system, user, assistant or tool.")
        check_text(content, f"the content of message {i} ({role})")
        if role == "system" and i > 0 and clean(content):
            raise ValueError(f"message {i} is a system message, and only the first message is shown as one: move it.")
        if role == "assistant" and not seen_user:
            raise ValueError(f"message {i} is an assistant turn before any user turn: put the user's message first.")
        seen_user |= role in ("user", "tool")
    if not seen_user:
        raise ValueError(f"none of the {len(messages)} messages is a user's: add one with role user.")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise ValueError(f"continue_final_message needs a final assistant message, got role {messages[-1]['role']!r}.")


def check_text(text, what: str) -> str:
    """`text` if it is a string, else a ValueError that says what should have been one."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, got {type(text).__name__}: decode or convert it first.")
    return text


# ----------------------------------------------------------------------------------------------------------------------
# The same in Jinja

# For transformers' apply_chat_template, saved in tokenizer_config.json. It renders one string, so there user text can
# spell a control token: inside this project chats are encoded from pieces instead.
CHAT_TEMPLATE = """
{%- macro clean(text) -%}{{- text.replace('/think', '').replace('/no_think', '').strip() -}}{%- endmacro -%}
{%- set s = namespace(on=true, system='', prefill='') -%}
{%- for m in messages if m.role in ['system', 'user'] -%}
  {%- if '/think' in m.content -%}{%- set s.on = true -%}
  {%- elif '/no_think' in m.content -%}{%- set s.on = false -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role == 'system' -%}{%- set s.system = clean(messages[0].content) -%}{%- endif -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- if turns[-1].role == 'assistant' -%}
  {%- set s.prefill = turns[-1].content.strip() -%}{%- set turns = turns[:-1] -%}
{%- endif -%}
{{- '<SPECIAL_10>System\\n' + s.system -}}
{%- if tools -%}
  {{- ('\\n\\n' if s.system else '') + TOOLS_INTRO + '\\n<AVAILABLE_TOOLS>[' -}}
  {%- for t in tools -%}{{- (t.function or t) | tojson -}}{{- '' if loop.last else ', ' -}}{%- endfor -%}
  {{- ']</AVAILABLE_TOOLS>\\n\\n' + TOOLS_USE -}}
{%- endif -%}
{{- '\\n' -}}
{%- for m in turns -%}
  {%- if m.role == 'user' -%}
    {{- '<SPECIAL_11>User\\n' + clean(m.content) + '\\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '' if loop.previtem is defined and loop.previtem.role == 'tool' else '<SPECIAL_11>User\\n<TOOL_RESPONSE>[' -}}
    {{- m.content -}}
    {{- ', ' if loop.nextitem is defined and loop.nextitem.role == 'tool' else ']</TOOL_RESPONSE>\\n' -}}
  {%- else -%}
    {%- set answer = (m.content.split('</think>')[1] if '</think>' in m.content else m.content).strip() -%}
    {{- '<SPECIAL_11>Assistant\\n' + answer -}}
    {%- if m.tool_calls -%}
      {{- ('\\n\\n' if answer else '') + '<TOOLCALL>[' -}}
      {%- for call in m.tool_calls -%}
        {%- set call = call.function or call -%}
        {{- '{"name": "' + call.name + '", "arguments": ' -}}
        {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
        {{- '}' if loop.last else '}, ' -}}
      {%- endfor -%}
      {{- ']</TOOLCALL>' -}}
    {%- endif -%}
    {{- '\\n<SPECIAL_12>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt or s.prefill -%}
  {{- '<SPECIAL_11>Assistant\\n' + ('<think>\\n' if s.on else '<think></think>') + s.prefill -}}
  {{- '' if add_generation_prompt or continue_final_message else '\\n<SPECIAL_12>\\n' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = CHAT_TEMPLATE.strip().replace("TOOLS_INTRO", repr(_TOOLS_INTRO)).replace("TOOLS_USE", repr(_TOOLS_USE))
