for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent.trim();
      const order = (first, second) => {
        if (first === "" || second === "") return (first === "") - (second === "");
        const difference = Number(first) - Number(second);
        return sign * (Number.isNaN(difference) ? first.localeCompare(second) : difference);
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((first, second) => order(value(first), value(second))));
    });
  }
}
