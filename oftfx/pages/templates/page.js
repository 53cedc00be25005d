// Charts: as wide as their place, drawn as SVG so that their text takes the page's colour.

const shown = [...document.querySelectorAll(".chart")].map(async (place) => {
  const spec = JSON.parse(place.parentElement.querySelector("script").textContent);
  const { view } = await vegaEmbed(place, spec, {
    renderer: "svg",
    actions: { export: true, source: false, compiled: false, editor: false },
    downloadFileName: place.dataset.name,
    tooltip: { theme: "custom" },
  });
  place.style.minHeight = "";
  const picture = place.querySelector("svg.marks");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", place.dataset.says);
  const menu = place.querySelector("summary");
  menu.setAttribute("aria-label", "Save this chart");
  menu.firstElementChild.setAttribute("aria-hidden", "true");
  view.addEventListener("click", (event, item) => item?.datum?.name && find(item.datum.name));
});

// Tables: sorted, searched, filtered, grouped.
const grids = [];
function find(name) {
  const grid = grids[0];
  if (!grid) return;
  grid.search(name);
  grid.element.scrollIntoView({ block: "start" });
}

function field(label, control) {
  const wrap = document.createElement("label");
  wrap.append(label, control);
  return wrap;
}

function choice(options) {
  const select = document.createElement("select");
  select.append(...options.map(([text, value]) => new Option(text, value)));
  return select;
}

const plain = (cell) => {
  const box = document.createElement("div");
  box.innerHTML = typeof cell === "string" ? cell : cell.display;
  return box.textContent;
};

function grid(DataTable, element) {
  const heads = [...element.tHead.rows[0].cells];
  const opened = new Set();
  let printing = false;
  let grouped = -1;
  const table = new DataTable(element, {
    order: [],
    pageLength: 25,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    rowGroup: { enable: false, dataSrc: (row) => plain(row[Math.max(grouped, 0)]), startRender: head },
    autoWidth: false,
  });

  // A group's own line: a button that opens it, how many rows it has, and the extremes of its numbers.
  function head(rows, group) {
    const open = printing || opened.has(group);
    for (const row of rows.nodes().toArray()) row.hidden = !open;
    const line = document.createElement("tr");
    const cell = line.insertCell();
    cell.colSpan = heads.filter((th) => !th.classList.contains("aside")).length;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-expanded", open);
    button.textContent = `${open ? "▾" : "▸"} ${group}`;
    button.addEventListener("click", () => {
      open ? opened.delete(group) : opened.add(group);
      table.draw(false);
      [...element.querySelectorAll("tr.dtrg-group button")].find((b) => b.textContent.slice(2) === group)?.focus();
    });
    const said = document.createElement("span");
    said.className = "said";
    const indexes = rows.indexes().toArray();
    said.textContent = [`${indexes.length} rows`, ...extremes(indexes)].join(" · ");
    cell.append(button, said);
    return line;
  }

  function extremes(indexes) {
    return heads.flatMap((th, column) => {
      const which = th.dataset.extreme;
      if (!which) return [];
      const cells = indexes.map((i) => table.cell(i, column).node()).filter((c) => !c.querySelector(".missing"));
      if (!cells.length) return [];
      const sign = which === "lowest" ? 1 : -1;
      cells.sort((a, b) => sign * (a.dataset.order - b.dataset.order));
      return [`${which} ${th.dataset.title}: ${cells[0].textContent}`];
    });
  }

  // The tools above, and the pages below.
  const tools = document.querySelector(`.tools[data-for="${element.id}"]`);
  const search = document.createElement("input");
  search.type = "search";
  search.addEventListener("input", () => table.search(search.value).draw());
  tools.append(field("Search", search));
  heads.forEach((th, column) => {
    if (!("filters" in th.dataset)) return;
    const values = [...new Set(table.column(column).data().toArray().map(plain))];
    if (values.length < 2) return;
    const select = choice([["all", ""], ...values.map((v) => [v || "(none)", v])]);
    select.addEventListener("change", () => {
      const wanted = select.selectedIndex ? (cell) => cell === select.value : null;
      table.column(column).search.fixed("chosen", wanted).draw();
    });
    tools.append(field(th.dataset.title, select));
  });
  const groups = heads.flatMap((th, column) => ("groups" in th.dataset ? [[th.dataset.title, column]] : []));
  const by = choice([["nothing", -1], ...groups]);
  by.addEventListener("change", () => group(Number(by.value)));
  if (groups.length) tools.append(field("Group by", by));
  tools.hidden = false;

  function group(column) {
    grouped = column;
    opened.clear();
    for (const row of table.rows().nodes().toArray()) row.hidden = false;
    if (column >= 0) table.rowGroup().enable();
    else table.rowGroup().disable();
    table.order.fixed(column >= 0 ? { pre: [[column, "asc"]] } : {});
    table.page.len(column >= 0 ? -1 : 25).draw();
    pager.hidden = column >= 0;
  }

  const pager = document.createElement("div");
  pager.className = "pager";
  const [back, on, all] = ["Previous", "Next", "Show all"].map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    return button;
  });
  const where = document.createElement("span");
  where.setAttribute("role", "status");
  back.addEventListener("click", () => table.page("previous").draw(false));
  on.addEventListener("click", () => table.page("next").draw(false));
  all.addEventListener("click", () => table.page.len(table.page.len() < 0 ? 25 : -1).draw());
  pager.append(where, back, on, all);
  element.closest(".scroll").after(pager);
  table.on("draw", state);
  function state() {
    const { start, end, recordsDisplay, recordsTotal, page, pages } = table.page.info();
    const of = recordsDisplay < recordsTotal ? ` (of ${recordsTotal})` : "";
    where.textContent = recordsDisplay ? `Rows ${start + 1} to ${end} of ${recordsDisplay}${of}` : "No row matches";
    back.disabled = page === 0;
    on.disabled = page >= pages - 1;
    all.textContent = table.page.len() < 0 ? "25 a page" : "Show all";
  }
  state();

  // All rows on paper, as long as it prints.
  let length = 25;
  window.addEventListener("beforeprint", () => {
    printing = true;
    length = table.page.len();
    table.page.len(-1).draw();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    table.page.len(length).draw();
  });

  return {
    element: tools,
    search(text) {
      if (grouped >= 0) group((by.value = -1));
      search.value = text;
      table.search(text).draw();
    },
  };
}

const live = [...document.querySelectorAll("table.live")];
if (live.length) {
  const { default: DataTable } = await import(tableLibrary);
  DataTable.ext.errMode = "throw";
  for (const element of live) {
    for (const th of element.tHead.rows[0].cells) th.dataset.title = th.textContent;
    grids.push(grid(DataTable, element));
  }
}

await Promise.all(shown);
document.documentElement.dataset.ready = "yes";
