// What is wrong with the page as it stands, in words: faint text, pictures and buttons without a name, a page wider than the screen.
(limit) => {
  const found = [];
  for (const change of document.getAnimations()) if (change instanceof CSSTransition) change.finish();
  const name = e => {
    const owner = e.closest('[id]');
    return `${e.tagName.toLowerCase()}.${[...e.classList].join('.')} in #${owner ? owner.id : 'page'}`;
  };
  const color = text => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, ground) => [0, 1, 2].map(i => top[i] * top[3] + ground[i] * (1 - top[3])).concat(1);
  const luminance = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  };
  // The ground below an element; null where a picture or a gradient lies under it.
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.backgroundImage !== 'none') return null;
      const layer = color(style.backgroundColor);
      if (layer[3]) layers.push(layer);
      if (layer[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const opacity = element => {
    let value = 1;
    for (let e = element; e; e = e.parentElement) value *= Number(getComputedStyle(e).opacity);
    return value;
  };
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true})
    && e.getBoundingClientRect().width > 1;
  const readable = (element, ink, text) => {
    const below = ground(element);
    if (!below || !text.trim()) return;
    const top = color(ink);
    top[3] *= opacity(element);
    const ratio = contrast(over(top, below), below);
    if (ratio < limit) found.push(`contrast ${ratio.toFixed(2)}: "${text.trim().slice(0, 40)}", ${name(element)}`);
  };

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest('script, style, option') || !seen(element)) continue;
    const style = getComputedStyle(element);
    readable(element, element.closest('svg') ? style.fill : style.color, walker.currentNode.data);
  }
  for (const field of document.querySelectorAll('input, textarea')) {
    if (!seen(field) || field.type === 'file') continue;
    const shown = field.value ? getComputedStyle(field) : getComputedStyle(field, '::placeholder');
    if (!['radio', 'checkbox', 'range'].includes(field.type)) readable(field, shown.color, field.value || field.placeholder || '');
    if (!field.labels?.length && !field.ariaLabel && !field.getAttribute('aria-labelledby') && !field.title)
      found.push(`no label: ${field.type} ${name(field)}`);
  }
  for (const button of document.querySelectorAll('button, a[href], [role=button]')) {
    const picture = button.querySelector('img[alt]:not([alt=""])');
    const label = button.innerText.trim() || button.ariaLabel || button.title || button.querySelector('[aria-label]');
    if (seen(button) && !label && !picture) found.push(`no name: ${name(button)}`);
  }
  for (const picture of document.querySelectorAll('img'))
    if (seen(picture) && !picture.alt) found.push(`no alt text: ${name(picture)}`);
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) found.push(`the page is ${width} px wide on a screen of ${innerWidth}`);
  return [...new Set(found)];
}
