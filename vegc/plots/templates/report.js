// Two comforts, and nothing is lost without them: tables that sort, and a cell of the matrix that shows its pictures.
(() => {
  const number = cell => {
    const text = cell.dataset.v ?? cell.textContent.trim();
    const value = Number.parseFloat(text.replaceAll(',', ''));
    return text !== '' && Number.isFinite(value) ? value : null;
  };
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x !== null ? -1 : 1;
    return a.textContent.localeCompare(b.textContent);
  };
  for (const table of document.querySelectorAll('table.sort')) {
    const heads = [...table.rows[0].cells];
    heads.forEach((head, at) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement('button');
      button.type = 'button';
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener('click', () => {
        const down = head.getAttribute('aria-sort') === 'ascending';
        heads.forEach(h => h.removeAttribute('aria-sort'));
        head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
        const rows = [...table.rows].slice(1);
        const filled = rows.filter(r => r.cells[at].textContent.trim() || r.cells[at].dataset.v);
        const empty = rows.filter(r => !filled.includes(r));
        filled.sort((a, b) => (down ? -1 : 1) * compare(a.cells[at], b.cells[at]));
        rows[0]?.parentNode.append(...filled, ...empty);
      });
    });
  }

  const panel = document.getElementById('cell');
  const cells = [...document.querySelectorAll('svg.matrix a')];
  if (!panel || !cells.length) return;
  const place = a => [Number(a.dataset.i), Number(a.dataset.j)];
  const current = () => cells.find(a => a.getAttribute('tabindex') === '0');
  const focus = a => {
    cells.forEach(c => c.setAttribute('tabindex', c === a ? '0' : '-1'));
    a.focus();
  };
  const close = () => {
    panel.hidden = true;
    cells.forEach(c => c.setAttribute('aria-expanded', 'false'));
  };
  const show = a => {
    const source = document.getElementById(a.getAttribute('href').slice(1));
    if (!source) return;
    close();
    panel.replaceChildren(...[...source.childNodes].map(n => n.cloneNode(true)));
    panel.hidden = false;
    a.setAttribute('aria-expanded', 'true');
    panel.scrollIntoView({block: 'nearest'});
  };
  // one cell is in the tab order; arrows go on from there to the nearest cell with pictures
  cells.forEach((a, k) => {
    a.setAttribute('tabindex', k ? '-1' : '0');
    a.setAttribute('role', 'button');
    a.setAttribute('aria-expanded', 'false');
    a.addEventListener('click', e => { e.preventDefault(); focus(a); show(a); });
  });
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  document.querySelector('svg.matrix').addEventListener('keydown', e => {
    const a = current();
    if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); show(a); return; }
    if (e.key === 'Escape') { close(); return; }
    if (!(e.key in steps)) return;
    e.preventDefault();
    const [di, dj] = steps[e.key], [i, j] = place(a);
    let best = null, least = Infinity;
    for (const c of cells) {
      const [y, x] = place(c), ahead = (y - i) * di + (x - j) * dj, aside = Math.abs((y - i) * dj) + Math.abs((x - j) * di);
      if (ahead > 0 && ahead + 3 * aside < least) { best = c; least = ahead + 3 * aside; }
    }
    if (best) focus(best);
  });
  panel.addEventListener('keydown', e => { if (e.key === 'Escape') { close(); current().focus(); } });
})();
