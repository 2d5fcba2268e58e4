import { createHash, timingSafeEqual } from 'node:crypto';
import { ApiError } from '../errors.js';

/** Checks bearer tokens against the configured keys in a time that does not depend on them. */
export class ApiKeys {
  readonly #hashes: readonly Buffer[]; // [num_keys] of 32 bytes

  constructor(keys: readonly string[]) {
    this.#hashes = keys.map(hashOf);
  }

  /** The caller's tenant: '' where no keys are configured, else a name made from its key. Throws ApiError. */
  tenantOf(authorization: string | undefined): string {
    if (this.#hashes.length === 0) return '';
    const token = /^Bearer +([^\s]+) *$/i.exec(authorization ?? '')?.[1];
    const hash = hashOf(token ?? '');
    let isKnown = false;
    for (const known of this.#hashes) isKnown = timingSafeEqual(known, hash) || isKnown;
    if (!isKnown || token === undefined) {
      throw new ApiError('invalid_api_key', 'Send a valid API key as header "Authorization: Bearer KEY".');
    }
    return hash.toString('hex').slice(0, 16);
  }
}

function hashOf(key: string): Buffer {
  return createHash('sha256').update(key).digest();
}
