import { createRequire } from 'node:module';
import { StartupError } from '../errors.js';
import { sizeOf, type ResponseStore, type StoredResponse } from './response-store.js';

/** What is used of node:sqlite, which Node has from 22.13 on. */
interface Database {
  exec(sql: string): void;
  prepare(sql: string): Statement;
  close(): void;
}

interface Statement {
  get(...values: (string | number | null)[]): Record<string, unknown> | undefined;
  all(...values: (string | number | null)[]): Record<string, unknown>[];
  run(...values: (string | number | null)[]): unknown;
}

const VERSION = 1;
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous_id TEXT, status TEXT NOT NULL,
    input TEXT NOT NULL, body TEXT NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL
  ) STRICT;
  CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
  PRAGMA user_version = ${VERSION};
`;

/** Responses in an SQLite database, which outlives the server. Calls are short: one row each, and those that make room. */
export class DatabaseResponses implements ResponseStore {
  readonly #database: Database;
  readonly #maxBytes: number;
  readonly #statements: Readonly<Record<'put' | 'get' | 'touch' | 'delete' | 'oldest', Statement>>;
  #numBytes: number;
  /** counts uses, on from what the database has */
  #use: number;

  /** Throws StartupError where this Node has no SQLite, or the file is none of ours. */
  constructor(file: string, maxBytes: number) {
    const database = open(file);
    this.#database = database;
    this.#maxBytes = maxBytes;
    try {
      // One server has it: what another one is making would look unfinished.
      database.exec('PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;');
      const version = Number(database.prepare('PRAGMA user_version').get()!['user_version']);
      if (version !== 0 && version !== VERSION) {
        throw new Error(`its version is ${version}, this server's is ${VERSION}`);
      }
      database.exec(SCHEMA);
      failUnfinished(database);
      const totals = database.prepare(
        'SELECT COALESCE(SUM(size), 0) AS size, COALESCE(MAX(used), 0) AS used FROM responses',
      );
      const { size, used } = totals.get()!;
      [this.#numBytes, this.#use] = [Number(size), Number(used)];
      this.#statements = {
        put: database.prepare('INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)'),
        get: database.prepare('SELECT * FROM responses WHERE id = ? AND tenant = ?'),
        touch: database.prepare('UPDATE responses SET used = ? WHERE id = ?'),
        delete: database.prepare('DELETE FROM responses WHERE id = ? RETURNING size'),
        oldest: database.prepare('SELECT id FROM responses ORDER BY used LIMIT 1'),
      };
    } catch (error) {
      database.close();
      throw unusable(file, error);
    }
  }

  put(response: StoredResponse): void {
    const size = sizeOf(response);
    const { id, tenant, previousId, status, input, body } = response;
    this.delete(id);
    if (size > this.#maxBytes) return;
    while (this.#numBytes + size > this.#maxBytes) this.delete(this.#statements.oldest.get()!['id'] as string);
    this.#statements.put.run(id, tenant, previousId, status, input, body, size, ++this.#use);
    this.#numBytes += size;
  }

  get(id: string, tenant: string): StoredResponse | undefined {
    const row = this.#statements.get.get(id, tenant);
    if (row === undefined) return undefined;
    this.#statements.touch.run(++this.#use, id);
    return toResponse(row);
  }

  delete(id: string): void {
    const row = this.#statements.delete.get(id);
    if (row !== undefined) this.#numBytes -= Number(row['size']);
  }

  close(): void {
    this.#database.close();
  }
}

function open(file: string): Database {
  let sqlite: { DatabaseSync: new (file: string) => Database };
  try {
    sqlite = createRequire(import.meta.url)('node:sqlite') as typeof sqlite;
  } catch {
    throw new StartupError(
      `--response-store needs SQLite, which Node has from 22.13 on; this is Node ${process.versions.node}. ` +
        'Run a newer Node, or leave the flag out: responses are then kept in memory.',
    );
  }
  try {
    return new sqlite.DatabaseSync(file);
  } catch (error) {
    throw unusable(file, error);
  }
}

function unusable(file: string, error: unknown): StartupError {
  return new StartupError(`--response-store ${file} cannot be used: ${(error as Error).message}. Give another file.`);
}

/** What a server before this one was making when it ended. */
function failUnfinished(database: Database): void {
  const rows = database.prepare("SELECT * FROM responses WHERE status IN ('queued', 'in_progress')").all();
  const update = database.prepare("UPDATE responses SET status = 'failed', body = ? WHERE id = ?");
  for (const row of rows) {
    const { id, body } = toResponse(row);
    const error = { code: 'server_error', message: 'The server ended while it was making this response.' };
    // Not parsed, because its seed may have 64 bits: the two fields stand before any text of a client.
    const failed = body.replace(
      /"status":"(?:queued|in_progress)","error":null/,
      `"status":"failed","error":${JSON.stringify(error)}`,
    );
    update.run(failed, id);
  }
}

function toResponse(row: Record<string, unknown>): StoredResponse {
  const [id, tenant, status] = [
    row['id'] as string,
    row['tenant'] as string,
    row['status'] as StoredResponse['status'],
  ];
  const [input, body] = [row['input'] as string, row['body'] as string];
  return { id, tenant, previousId: row['previous_id'] as string | null, status, input, body };
}
