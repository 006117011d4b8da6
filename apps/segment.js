// Clicking the photo by other means than the left button: the right button or a long press, and the keyboard.
const start = (block, status) => {
  const photo = () => block.querySelector('.image-frame img');

  // The shown picture inside its element, which may be wider or higher than the picture.
  const area = img => {
    const box = img.getBoundingClientRect(), scale = Math.min(box.width / img.naturalWidth, box.height / img.naturalHeight);
    const width = img.naturalWidth * scale, height = img.naturalHeight * scale;
    return {left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height};
  };
  const click = (x, y, remove) => {
    if (!photo()?.naturalWidth) return void setTimeout(() => click(x, y, remove), 50);  // the picture is being replaced
    window.segmentRemove = remove;
    photo().dispatchEvent(new MouseEvent('click', {clientX: x, clientY: y, bubbles: true}));
  };
  block.addEventListener('click', event => {  // a left click while the picture is being replaced would be lost
    if (event.target !== photo() || photo().naturalWidth) return;
    event.stopPropagation();
    click(event.clientX, event.clientY, false);
  }, true);
  block.oncontextmenu = event => {
    if (event.target !== photo()) return;
    event.preventDefault();
    click(event.clientX, event.clientY, true);
  };

  block.tabIndex = 0;
  block.setAttribute('role', 'group');
  const help = document.createElement('span');
  [help.id, help.hidden] = ['segment-keys', true];
  help.textContent = 'Photo. Arrow keys move a cross, Enter clicks there, Shift and Enter removes.';
  block.setAttribute('aria-labelledby', help.id);  // gradio resets aria-label
  status.setAttribute('aria-live', 'polite');
  const cross = document.createElement('div');
  cross.id = 'segment-cross';
  block.append(cross, help);
  const at = {x: 0.5, y: 0.5};
  let last = null;  // where the cross stood: a picture that is being replaced has no size for a moment
  const place = () => {
    const img = photo();
    cross.hidden = !img || document.activeElement !== block;
    if (cross.hidden) return null;
    if (!img.naturalWidth) return last;
    const shown = area(img), own = block.getBoundingClientRect();
    const x = shown.left + at.x * shown.width, y = shown.top + at.y * shown.height;
    cross.style.left = `${x - own.left - block.clientLeft}px`;
    cross.style.top = `${y - own.top - block.clientTop}px`;
    return last = {x, y, shown};
  };
  place();
  block.addEventListener('focus', place);
  block.addEventListener('blur', place);
  const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  const press = ({key, shiftKey}) => {
    const here = place();
    if (!here) return;
    const [dx, dy] = moves[key] ?? [0, 0], step = shiftKey ? 2 : 12;  // pixels of the screen
    at.x = Math.min(Math.max(at.x + dx * step / here.shown.width, 0), 0.999);
    at.y = Math.min(Math.max(at.y + dy * step / here.shown.height, 0), 0.999);
    place();
    if (!moves[key]) click(here.x, here.y, shiftKey || key === 'Backspace');
  };
  const keys = [];  // pressed, and not acted on while the picture is being replaced
  const act = () => {
    for (; keys.length; keys.shift()) {
      if (photo() && !photo().naturalWidth) return void setTimeout(act, 50);
      press(keys[0]);
    }
  };
  block.addEventListener('keydown', event => {
    if (event.target !== block || !photo() || !(moves[event.key] || ['Enter', 'Backspace'].includes(event.key))) return;
    event.preventDefault();
    if (keys.push(event) === 1) act();
  });
};

// The page is built piece by piece.
const waiting = setInterval(() => {
  const [block, status] = ['segment-picture', 'segment-status'].map(id => document.getElementById(id));
  if (!block || !status) return;
  clearInterval(waiting);
  start(block, status);
}, 30);
