/** The engine process with the real engine; SIGUSR2 makes its GPU context fail. */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { hostEngine } from '../../server/engine/host.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import { startEngine } from '../../server/engine/start-engine.js';

const MODULE = fileURLToPath(new URL('../../build/rodin_cuda_fault.node', import.meta.url));
const { fault } = createRequire(import.meta.url)(MODULE) as { fault: () => string };

hostEngine(
  (config, onProgress) => startEngine(loadAddon(), config, onProgress),
  (code) => process.exit(code),
);
process.on('SIGUSR2', () => console.error(`fault: ${fault()}`));
