"""The page's CSS: light and dark mode, narrow screens and print."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --ground: #fff; --text: #1b1f24; --quiet: #5b6470; --line: #d9dde3; --band: #f4f6f8;
  --better: #1d6b3a; --worse: #a3261f; --hit: 31, 95, 168;
  --series-0: #1f5fa8; --series-1: #b4531a; --series-2: #2c7a4b;
  --series-3: #8a3b8f; --series-4: #7a6a12; --series-5: #a83246;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --text: #e6e9ed; --quiet: #a2abb6; --line: #363c45; --band: #1e2329;
    --better: #7fce9b; --worse: #f19a92; --hit: 110, 168, 240;
    --series-0: #7fb2ef; --series-1: #f0a06a; --series-2: #77c795;
    --series-3: #d797dc; --series-4: #d3c25c; --series-5: #f08d9d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; -webkit-text-size-adjust: 100%;
}
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 44rem; margin: .5rem 0; overflow-wrap: anywhere; }
p.lead { font-size: 1.08rem; }
.box, pre { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
p.caption { color: var(--quiet); font-size: .92rem; margin: .75rem 0 -.5rem; }
th, td {
  padding: .4rem .75rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; white-space: nowrap;
}
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th {
  font-weight: 500; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 18rem;
  position: sticky; left: 0; background: var(--ground);
}
table.words td, table.words th { text-align: left; }
thead th { font-weight: 600; color: var(--quiet); vertical-align: bottom; }
tr.groups th { text-align: center; border-bottom: 0; padding-bottom: 0; }
tr.strong > * { font-weight: 700; background: var(--band); }
small { display: block; font-size: .85em; font-weight: 400; color: var(--quiet); }
.better small { color: var(--better); }
.worse small { color: var(--worse); }
table.heat td, table.heat thead th { text-align: center; min-width: 4.2rem; }
table.heat tr > th:first-child { text-align: left; min-width: 4rem; padding-left: 0; }
td.heat {
  background: rgba(var(--hit), calc(var(--share) * .5));
}
td.heat small, td.kind small { color: inherit; }
td.kind { background: color-mix(in srgb, var(--kind) 28%, var(--ground)); border: 1px solid var(--ground); }
.kind-full { --kind: var(--series-0); }
.kind-windowed { --kind: var(--series-1); }
.kind-linear { --kind: var(--series-2); }
figure { margin: 1rem 0; max-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--quiet); font-size: .92rem; }
p.asked { font-weight: 600; margin-top: 1.5rem; white-space: pre-wrap; }
dl { margin: .5rem 0; max-width: 44rem; font-size: .92rem; }
dt { color: var(--quiet); margin-top: .5rem; overflow-wrap: anywhere; }
dd { margin: 0 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: rgba(var(--hit), .25); color: inherit; }
summary { cursor: pointer; color: var(--quiet); margin: .5rem 0; }
pre { background: var(--band); padding: .9rem 1rem; font: .85rem/1.5 ui-monospace, monospace; border-radius: 4px; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  th, td { padding: .35rem .5rem; }
  tbody th { max-width: 10rem; }
  table.heat td, table.heat thead th { min-width: 3.3rem; padding: .35rem .25rem; }
}
@media print {
  :root { --ground: #fff; --text: #000; --quiet: #444; --line: #bbb; --band: #f4f4f4; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .box, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  th, td { white-space: normal; padding: .2rem .4rem; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  td.heat, td.kind { print-color-adjust: exact; }
  tbody th { position: static; }
}
""" + "".join(f".heat-{tenth} {{ --share: {tenth / 10}; }}\n" for tenth in range(11))
