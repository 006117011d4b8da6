// What every page of the studio carries.
(() => {
  let work = false;

  // On a narrow screen a result may lie far below the button that asks for it.
  const show = element => {
    const owner = element.closest('[class*="shows-"]');
    const name = owner && [...owner.classList].find(c => c.startsWith('shows-'));
    const target = name && document.getElementById(name.slice(6));
    if (target && innerWidth < 760) setTimeout(() => target.scrollIntoView({behavior: 'smooth', block: 'start'}), 50);
  };

  addEventListener('click', event => {
    const link = event.target.closest('.studio-nav a, .studio-card');
    const theme = new URLSearchParams(location.search).get('__theme');
    if (link && theme) link.search = `?__theme=${theme}`;
    if (event.target.closest('.studio-work')) work = true;
    if (event.target.closest('button, a')) show(event.target);
  }, true);
  addEventListener('change', event => {
    if (!event.target.matches('input[type=file]')) return;
    work = true;
    show(event.target);
  }, true);
  addEventListener('drop', event => {
    work = true;
    show(event.target);
  }, true);
  // Gradio closes its streams on this event, though the visitor may answer "stay": the page would be dead, and calls under way would fail
  // aloud. It does not hear of it (this script came first): the browser closes the streams when the page really goes.
  addEventListener('beforeunload', event => {
    event.stopImmediatePropagation();
    if (work) event.preventDefault();
  });
})();
