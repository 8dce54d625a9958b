"""How the page looks."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ground: #f6f7f9; --ink: #1f2430; --soft: #5b6475; --line: #d5d9e0;
  --kept: #2f6bd8; --gone: #d9591f; --third: #12907f; --pale: #b4bccb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1a1e26; --ground: #12151b; --ink: #e4e8ef; --soft: #9aa4b5; --line: #363d4a;
    --kept: #6ea0ff; --gone: #ff9463; --third: #4cc9b5; --pale: #69738a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
section h2 { margin: 0 0 .35rem; font-size: 1.15rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
.kind { margin: 0; color: var(--soft); font-size: .85rem; }
.summary { margin: .25rem 0 1.25rem; font-size: 1.05rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile, section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.tile { flex: 1 1 14.5rem; padding: .7rem .9rem; }
.tile h2 { margin: 0; font-size: .85rem; font-weight: 400; color: var(--soft); }
.tile p { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.tile .note { font-size: .8rem; color: var(--soft); }
.before, .arrow { color: var(--soft); }
section { margin-top: .75rem; padding: 1rem 1.1rem; }
figure { margin: .25rem 0 .5rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; color: var(--ink); }
figure svg text { font-family: system-ui, sans-serif !important; fill: currentColor; }
details { margin-top: .5rem; }
summary { cursor: pointer; color: var(--kept); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: .35rem; font-size: .85rem; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 400; }
td { overflow-wrap: anywhere; min-width: 4rem; }
.numbers td:first-child { min-width: 9rem; }
.words td:first-child { white-space: nowrap; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers td { font-variant-numeric: tabular-nums; }
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --ground: #ffffff; --ink: #1f2430; --soft: #5b6475; --line: #d5d9e0;
    --kept: #2f6bd8; --gone: #d9591f; --third: #12907f; --pale: #b4bccb;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  section, .tile { break-inside: avoid; }
  section:has(table) { break-inside: auto; }
  figure, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  * { print-color-adjust: exact; }
}
"""
