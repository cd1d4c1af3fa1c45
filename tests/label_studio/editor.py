"""A reviewer's hands in Label Studio's editor: smart tools, labels, clicks, boxes, suggestions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.label_studio.browser import Browser
from tests.waiting import wait_for

ALT, CONTROL = "\ue00a", "\ue009"  # WebDriver's names of keys

_AUTO = """
const toggle = document.querySelector('[data-testid="bottombar-auto-annotation-toggle"]');
if (toggle && !window.Htx.autoAnnotation) toggle.click();
return Boolean(window.Htx.autoAnnotation);
"""
# The chosen smart tool: its control and its kind. A rectangle's control has two kinds.
_TOOL = """
const tools = window.Htx.annotationStore.selected.names.get('image').getToolsManager().allTools();
const tool = tools.find(tool => tool.selected && tool.dynamic);
return tool ? `${tool.control.name} ${tool.toolName}` : '';
"""
# The menu of smart tools, in the order of the config's smart controls: a rectangle's control has two.
_MENU = {"click": (0, "click KeyPointTool"), "box": (1, "box RectangleTool"), "pick": (3, "pick KeyPointTool")}
_CHOOSE = "document.querySelectorAll('.lsf-toolbar__smart > div')[arguments[0]].click();"
_LABELED = """
const row = window.Htx.annotationStore.selected.names.get('prompt');
return row.selectedLabels.map(label => label.value).join();
"""
_SUGGESTIONS = """
if (window.Htx.awaitingSuggestions) return null;
const open = window.Htx.annotationStore.selected;
return [...open.suggestions.values()].map(region => region.cleanId);
"""
_PROMPTS = """
const regions = window.Htx.annotationStore.selected.regionStore.regions;
return regions.filter(region => region.dynamic).length;
"""
_REGIONS = """
const regions = window.Htx.annotationStore.selected.regionStore.regions;
return regions.filter(region => !region.dynamic).map(region => region.cleanId);
"""
_TICK = """
const open = window.Htx.annotationStore.selected;
for (const id of [...open.suggestions.keys()]) open.acceptSuggestion(id);
"""
_PRESS = 'document.querySelector(`[data-testid="bottombar-${arguments[0]}-suggestions-button"]`)?.click();'


@dataclass(frozen=True, kw_only=True)
class Editor:
    """The editor of an open task. The row of labels of the smart controls has the first keys."""

    browser: Browser

    def use_auto_annotation(self) -> None:
        self.browser.wait(_AUTO, what="Auto-Annotation switched on")

    def choose_tool(self, control: str) -> None:
        """Choose the smart tool of a control in the toolbar's menu."""
        place, name = _MENU[control]
        self.browser.run(_CHOOSE, place)
        self.browser.wait(f"return (() => {{{_TOOL}}})() === arguments[0];", name, what=f"the smart tool {control}")

    def choose_label(self, key: str, label: str) -> None:
        """Press the label's key. A label stays chosen for one prompt."""
        if self.browser.run(_LABELED) != label:
            self.press(key)
        self.browser.wait(f"return (() => {{{_LABELED}}})() === arguments[0];", label, what=f"the label {label}")

    def prompt(self, *way: Sequence[float], held: Sequence[str] = (CONTROL,)) -> list[str]:
        """Click one place or drag along several, with keys held. Returns the ids of the suggestions that follow.

        With Control a click goes through the regions under it.
        """
        before = self.browser.run(_PROMPTS)
        self._mouse(way, held)
        self.browser.wait(f"return (() => {{{_PROMPTS}}})() > arguments[0];", before, what="the prompt's region")
        return self.suggestions()

    def suggestions(self) -> list[str]:
        """The ids of the suggestions, once no answer is awaited."""
        found: list[list[str] | None] = [None]

        def answered() -> bool:
            found.append(self.browser.run(_SUGGESTIONS))
            return found[-1] is not None and found[-1] == found[-2]

        wait_for(answered, "the answer")
        assert found[-1] is not None
        return found[-1]

    def regions(self) -> list[str]:
        """The ids of the regions that are no prompts."""
        found: list[str] = self.browser.run(_REGIONS)
        return found

    def accept(self) -> None:
        """Press the check mark of the bar below the picture. All prompts go."""
        self.browser.run(_PRESS, "accept")
        self.browser.wait(f"return (() => {{{_PROMPTS}}})() === 0;", what="the prompts to go")

    def tick(self) -> None:
        """Accept as the tick on each suggestion does: the prompts stay."""
        self.browser.run(_TICK)

    def reject(self) -> None:
        self.browser.run(_PRESS, "reject")
        self.browser.wait(f"return (() => {{{_PROMPTS}}})() === 0;", what="the prompts to go")

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.browser.act({"type": "key", "id": "keyboard", "actions": actions})

    def _mouse(self, way: Sequence[Sequence[float]], held: Sequence[str]) -> None:
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 100} for x, y in way]
        mouse: list[dict[str, Any]] = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:]]
        mouse.append({"type": "pointerUp", "button": 0})
        pause = {"type": "pause", "duration": 0}
        down = [{"type": "keyDown", "value": key} for key in held]
        up = [{"type": "keyUp", "value": key} for key in held]
        keys = [*down, *[pause] * len(mouse), *up]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self.browser.act(
            {"type": "key", "id": "keyboard", "actions": keys}, {**pointer, "actions": [*[pause] * len(down), *mouse]}
        )
