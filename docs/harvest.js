// Write the addresses of all pictures that this page shows into a CSV for `vegc plan` and `vegc ingest`.
//
// How: scroll until you see all pictures you want, open the browser's console (F12), paste this file, press Enter.
// The file <title>.csv is downloaded; rename it after the class. Nothing is sent anywhere, nothing is loaded.
//
// Of each picture the best address is taken: data-iurl, data-src, the largest of srcset, then what it shows now.
// Pictures that stand in the page itself (data: addresses) are kept: the first twenty or so results are only there.
(() => {
  const LEAST_INLINE = 300; // bytes; smaller inline pictures are placeholders and icons
  const absolute = url => { try { return new URL(url, document.baseURI).href; } catch { return ''; } };
  const largest = set => (set || '').match(/\S*[^\s,](?:\s+[\d.]+[wx])?(?=\s*(?:,\s|,?$))/g)?.map(s => s.trim().split(/\s+/))
    .sort((a, b) => parseFloat(b[1] || 1) - parseFloat(a[1] || 1))[0]?.[0];
  const usable = url => {
    if (!url) return false;
    if (!/^data:/i.test(url)) return /^https?:/i.test(url);
    const [head, body = ''] = [url.slice(0, url.indexOf(',')), url.slice(url.indexOf(',') + 1)];
    return /^data:image\//i.test(head) && !/svg/i.test(head) && (/;base64/i.test(head) ? body.length * 3 / 4 : body.length) >= LEAST_INLINE;
  };
  const field = text => `"${String(text).replace(/\s+/g, ' ').trim().replace(/"/g, '""')}"`;
  const seen = new Map();
  for (const img of document.querySelectorAll('img')) {
    const candidates = [img.dataset.iurl, img.dataset.src, largest(img.getAttribute('srcset') || img.dataset.srcset), img.getAttribute('src')];
    const url = candidates.filter(Boolean).map(u => /^data:/i.test(u) ? u : absolute(u)).find(usable);
    if (url && !seen.has(url)) seen.set(url, [url, document.title, seen.size + 1, img.closest('a')?.href || '', img.alt]);
  }
  const csv = 'url,query,rank,landing_url,title\n' + [...seen.values()].map(row => row.map(field).join(',') + '\n').join('');
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([csv], { type: 'text/csv' }));
  link.download = `${document.title.replace(/[\\/:*?"<>|]+/g, ' ').trim() || 'pictures'}.csv`;
  link.click();
  return `${seen.size} pictures written to ${link.download}`;
})();
