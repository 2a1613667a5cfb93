"""How the pages look, in the light and in the dark."""

from __future__ import annotations

STYLE = """
.relflat{--ink:#1d2733;--soft:#5b6875;--line:#d9dfe5;--paper:#fff;--bar:#b9d4f1;--wrong:#b3261e;color:var(--ink);
background:var(--paper);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){.relflat{--ink:#e6ebf0;--soft:#a3afba;--line:#39444f;--paper:#161b21;--bar:#2c4f75;
--wrong:#ff8a80}main.relflat{color-scheme:dark}body:has(>main.relflat){background:#161b21}}
body:has(>main.relflat){margin:0}
main.relflat{max-width:1080px;margin:0 auto;padding:24px 16px 48px;box-sizing:border-box}
.relflat h1{font-size:1.6rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}
.relflat h2{font-size:1.25rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
.relflat h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
.relflat section{border-top:2px solid var(--line);margin-top:2.5rem}
.relflat p{margin:.35rem 0;max-width:46rem;overflow-wrap:anywhere}
.relflat .scroll{overflow-x:auto;margin:.75rem 0}
.relflat table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,30rem);color:var(--ink)}
.relflat th,.relflat td{text-align:left;padding:.3rem .75rem .3rem 0;border-bottom:1px solid var(--line);
vertical-align:top;font-variant-numeric:tabular-nums;background:none}
.relflat thead th{color:var(--soft);font-weight:600}
.relflat tbody th{font-weight:500;white-space:nowrap}
.relflat td{white-space:nowrap}
.relflat .wide td:last-child{white-space:normal;min-width:8rem}
.relflat td:last-child{overflow-wrap:anywhere}
.relflat em{color:var(--soft);font-size:.8em}
.relflat .bar{position:relative;display:block;min-width:9rem;padding:0 .4rem;white-space:nowrap}
.relflat .bar i{position:absolute;inset:0 auto 0 0;background:var(--bar);border-radius:3px}
.relflat .bar b{position:relative;font-weight:400}
.relflat .cards{display:flex;flex-wrap:wrap;gap:12px}
.relflat figure{margin:0;padding:8px;border:1px solid var(--line);border-radius:6px;width:112px;font-size:.85rem;
overflow-wrap:anywhere}
.relflat figure.wrong{border-color:var(--wrong)}
.relflat img{width:96px;max-height:144px;object-fit:contain;image-rendering:pixelated;display:block;margin:0 auto 6px}
@media (max-width:480px){.relflat table{font-size:.8rem}.relflat th,.relflat td{padding-right:.5rem}
.relflat .bar{min-width:7rem}}
"""
