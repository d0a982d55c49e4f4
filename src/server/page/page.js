// The page of `lowbit serve`: which view is shown, and what is served.

import { $ } from './dom.js';
import { api } from './api.js';
import { setModel, startChat } from './chat.js';
import { loadSeen } from './load.js';
import { startSettings } from './settings.js';

const TABS = ['chat', 'load'];
/** How long to wait while a server that was just started loads its model. */
const RETRY_MS = 2000;

/** Shows the view that the address names. */
function showView() {
  const shown = location.hash === '#load' ? 'load' : 'chat';
  for (const name of TABS) {
    const tab = $(`${name}-tab`);
    tab.ariaSelected = String(name === shown);
    tab.tabIndex = name === shown ? 0 : -1;
    $(name).hidden = name !== shown;
  }
  loadSeen();
}

function choose(name) {
  history.replaceState(null, '', `#${name}`);
  showView();
}

for (const [index, name] of TABS.entries()) {
  const other = TABS[1 - index];
  $(`${name}-tab`).addEventListener('click', () => choose(name));
  $(`${name}-tab`).addEventListener('keydown', ({ key }) => {
    if (key !== 'ArrowLeft' && key !== 'ArrowRight') return;
    choose(other);
    $(`${other}-tab`).focus();
  });
}

/** Asks the server what it serves, until it says. */
async function showServer() {
  try {
    const [models, version] = await Promise.all(['v1/models', 'version'].map(async (path) => (await api(path)).json()));
    const { id, max_model_len: length } = models.data[0];
    setModel(id);
    document.title = `${id} – lowbit`;
    $('server').textContent = `${id} · context ${length?.toLocaleString('en') ?? '?'} · ${version.version}`;
  } catch (error) {
    $('server').textContent = error.message;
    if (error.status !== 401) setTimeout(showServer, RETRY_MS);
  }
}

startSettings();
startChat();
addEventListener('hashchange', showView);
document.addEventListener('newkey', showServer);
showView();
showServer();
