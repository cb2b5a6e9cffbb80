// Keys press the buttons of the page, but for keys that are typed into a field. One press, one verdict: until the
// next item is there, `waiting` holds the item that was judged.
let waiting = null;
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (/^(INPUT|TEXTAREA|SELECT|VIDEO)$/.test(event.target.tagName) && event.target.type !== "radio") return;
  const name = {1: "one", 2: "two", t: "tie", s: "skip", b: "back"}[event.key.toLowerCase()];
  const button = name && document.querySelector(`#say-${name}`);
  const item = document.querySelector("#label-item [data-item]");
  if (!button || !button.offsetParent || (item && item.dataset.item === waiting)) return;
  waiting = name === "back" ? null : item && item.dataset.item;
  button.click();
  event.preventDefault();
});
