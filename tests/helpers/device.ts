/** Where the parity and end-to-end tests run: the CPU, or what RODIN_TEST_DEVICE names (`npm run test:gpu`). */
import { loadAddon } from '../../server/engine/load-addon.js';

export const TEST_DEVICE = process.env['RODIN_TEST_DEVICE'] ?? 'cpu';
export const IS_GPU = TEST_DEVICE !== 'cpu';

/** Instruction paths to test; a GPU has one. */
export function cpuPaths(): string[] {
  return IS_GPU ? ['auto'] : loadAddon().cpuPaths();
}
