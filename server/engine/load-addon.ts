import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { StartupError } from '../errors.js';
import type { NativeAddon } from './addon.js';

/** build/rodin.node of this package; the path is the same from server/engine and from dist/engine. */
export const ADDON_PATH = fileURLToPath(new URL('../../build/rodin.node', import.meta.url));

export function loadAddon(): NativeAddon {
  if (!existsSync(ADDON_PATH)) {
    throw new StartupError(`${ADDON_PATH} is missing; run \`npm run build\` to build the native addon.`);
  }
  try {
    return createRequire(import.meta.url)(ADDON_PATH) as NativeAddon;
  } catch (error) {
    throw new StartupError(
      `${ADDON_PATH} cannot be loaded: ${(error as Error).message}. Run \`npm run build\` to build it for this machine.`,
    );
  }
}
