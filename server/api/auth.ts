import { createHash, timingSafeEqual } from 'node:crypto';
import type { IncomingHttpHeaders } from 'node:http';
import { ApiError } from '../errors.js';

/** Checks bearer tokens and x-api-key headers against the configured keys in a time that does not depend on them. */
export class ApiKeys {
  readonly #hashes: readonly Buffer[]; // [num_keys] of 32 bytes

  constructor(keys: readonly string[]) {
    this.#hashes = keys.map(hashOf);
  }

  /** The caller's tenant: '' where no keys are configured, else a name made from its key. Throws ApiError. */
  tenantOf({ authorization, 'x-api-key': apiKey }: IncomingHttpHeaders): string {
    if (this.#hashes.length === 0) return '';
    const bearer = /^Bearer +([^\s]+) *$/i.exec(authorization ?? '')?.[1];
    // A client may send both, one of them meant for another server.
    const valid = [bearer, apiKey].map((key) => this.#hashOfKnown(key)).find((hash) => hash !== null);
    if (!valid) {
      const message = 'Send a valid API key as header "Authorization: Bearer KEY" or "x-api-key: KEY".';
      throw new ApiError('invalid_api_key', message);
    }
    return valid.toString('hex').slice(0, 16);
  }

  #hashOfKnown(key: string | string[] | undefined): Buffer | null {
    const hash = hashOf(typeof key === 'string' ? key : '');
    let isKnown = false;
    for (const known of this.#hashes) isKnown = timingSafeEqual(known, hash) || isKnown;
    return isKnown && typeof key === 'string' ? hash : null;
  }
}

function hashOf(key: string): Buffer {
  return createHash('sha256').update(key).digest();
}
