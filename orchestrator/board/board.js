"use strict";
// Regions that changed come as one JSON object: name of the region -> its HTML. Text in it was escaped by the server.
const live = document.querySelector("#live");
const waiting = new Map();

function say(text, name) {
  if (!live) return;
  live.textContent = text;
  live.className = name;
}

function put(name, html) {
  const region = document.getElementById(name);
  if (!region) return;
  // What a person holds by the keyboard is not taken away from under them.
  if (region.contains(document.activeElement)) { waiting.set(name, html); return; }
  waiting.delete(name);
  const scrolled = [...region.querySelectorAll(".rows, .examples")].map(list => list.scrollTop);
  region.innerHTML = html;
  region.querySelectorAll(".rows, .examples").forEach((list, n) => { list.scrollTop = scrolled[n] ?? 0; });
}

document.addEventListener("focusout", () => setTimeout(() => waiting.forEach((html, name) => put(name, html))));

function listen(address) {
  const source = new EventSource(address);
  source.onopen = () => say("live", "live");
  source.onmessage = event => { for (const [name, html] of Object.entries(JSON.parse(event.data))) put(name, html); };
  source.onerror = () => {
    say("not connected", "bad");
    // The server refused: the login has ended, or the job is gone. It says which.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 3000);
  };
}

const events = document.body.dataset.events;
if (events) listen(events);

const dialog = document.querySelector("dialog");
document.addEventListener("click", event => {
  const shot = event.target.closest?.(".samples .shot");
  if (!shot || !dialog) return;
  dialog.querySelector(".large").replaceChildren(...[...shot.children].map(child => child.cloneNode(true)));
  dialog.showModal();
});
dialog?.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
