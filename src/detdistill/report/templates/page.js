"use strict";
// Without this script tables keep their order, and pairs of pictures stand side by side.

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Numbers are first wanted from the largest on, words from A on.
      const numbers = [...body.rows].some((row) => row.cells[column].dataset.value);
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? "";
      const text = (row) => row.cells[column].textContent.trim();
      const order = (a, b) => {
        if (!numbers) return text(a).localeCompare(text(b), undefined, { numeric: true }) * (down ? -1 : 1);
        if (!key(a) || !key(b)) return !key(a) - !key(b); // what was not measured stands last
        return (Number(key(a)) - Number(key(b))) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}

for (const slide of document.querySelectorAll(".slide")) {
  const two = slide.querySelector(".two");
  const [before, after] = [...two.querySelectorAll("span")].map((name) => name.textContent);
  const range = document.createElement("input");
  Object.assign(range, { type: "range", min: 0, max: 100, value: 50 });
  range.setAttribute("aria-label", `${before} on the left, ${after} on the right: where they meet`);
  const move = () => {
    two.style.setProperty("--split", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${range.value}% ${before}, ${100 - range.value}% ${after}`);
  };
  range.addEventListener("input", move);
  two.after(range);
  slide.classList.add("sliding");
  move();
  // The picture itself can be dragged, too; up and down still scrolls.
  const drag = (event) => {
    const box = two.getBoundingClientRect();
    range.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    move();
  };
  two.style.touchAction = "pan-y";
  two.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    two.setPointerCapture(event.pointerId);
    drag(event);
  });
  two.addEventListener("pointermove", (event) => {
    if (two.hasPointerCapture(event.pointerId)) drag(event);
  });
}
