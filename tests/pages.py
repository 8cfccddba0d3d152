"""A check of every text's contrast on a page, for `page.evaluate`."""

# texts whose contrast with what lies behind them is below 4.5 : 1 (WCAG 2.1, AA)
CONTRAST = """() => {
  const light = c => { const v = c.map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                       return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const behind = e => { let layers = [];
                        for (; e; e = e.parentElement) {
                          const c = parse(getComputedStyle(e).backgroundColor);
                          layers.push(c);
                          if (c.length < 4 || c[3] === 1) break; }
                        return layers.reverse().reduce((a, c) => { const t = c.length < 4 ? 1 : c[3];
                          return a.map((x, n) => x * (1 - t) + c[n] * t); }, [255, 255, 255]); };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
  }
  return bad; }"""
