/* Tables of class "sortable": a click on a heading sorts by that column, and a field above filters the rows. */
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const text = (row, column) => row.cells[column].textContent.trim();

    const compare = (a, b) => a.localeCompare(b, "en", { numeric: true });

    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        rows.sort((a, b) => compare(text(a, column), text(b, column)) * (descending ? -1 : 1));
        body.append(...rows);
      });
    });

    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "Filter, such as: LoRA, or official code";
    field.setAttribute("aria-label", "Filter the rows of the table");
    const count = document.createElement("output");
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const content = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => content.includes(word));
      }
      count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    field.addEventListener("input", filter);
    filter();

    const tools = document.createElement("div");
    tools.className = "table-tools";
    tools.append(field, count);
    (table.closest(".table-wrapper") ?? table).before(tools);
  }
});
