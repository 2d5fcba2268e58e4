/** Entry of the engine process: the addon's only home beside `rodin logits`. */
import { hostEngine } from './host.js';
import { loadAddon } from './load-addon.js';
import { startEngine } from './start-engine.js';

hostEngine(
  (config, onProgress) => startEngine(loadAddon(), config, onProgress),
  (code) => process.exit(code),
);
