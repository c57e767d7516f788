// A click on a heading of a table sorts it by that column, another one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const key = row => row.cells[column].textContent.trim();
    const isText = [...body.rows].some(row => isNaN(key(row)));
    const sort = () => {
      const wasDown = head.ariaSort === "descending";
      // Names begin at A, numbers at the largest.
      const sign = head.ariaSort ? (wasDown ? 1 : -1) : (isText ? 1 : -1);
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const order = (a, b) => isText ? key(a).localeCompare(key(b), undefined, {numeric: true}) : key(a) - key(b);
      body.append(...[...body.rows].sort((a, b) => sign * order(a, b)));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => event.key === "Enter" && sort());
  });
}
