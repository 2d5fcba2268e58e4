import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createRequire } from 'node:module';

/** What is used of the WebSocket client of the library ws. */
interface Ws {
  readonly _socket: { pause(): void; resume(): void };
  send(data: string | Buffer): void;
  close(): void;
  terminate(): void;
  on(event: string, listener: (...args: any[]) => void): void;
  removeListener(event: string, listener: (...args: any[]) => void): void;
}

const WebSocket = createRequire(import.meta.url)('ws') as new (url: string, options?: object) => Ws;

/** A client of the WebSocket on /v1/responses that keeps every frame. */
export class Frames {
  readonly socket: Ws;
  readonly all: any[] = [];
  /** code and reason of its end */
  readonly closed: Promise<{ code: number; reason: string }>;
  readonly #waiting = new Set<() => void>();

  private constructor(socket: Ws) {
    this.socket = socket;
    this.closed = new Promise((resolve) => {
      socket.on('close', (code: number, reason: Buffer) => resolve({ code, reason: reason.toString() }));
    });
    socket.on('error', () => {});
    socket.on('message', (data: Buffer) => {
      this.all.push(JSON.parse(data.toString()));
      for (const wake of [...this.#waiting]) wake();
    });
  }

  static async open(url: string, headers: Record<string, string> = {}): Promise<Frames> {
    const client = new Frames(new WebSocket(`${url.replace('http', 'ws')}/v1/responses`, { headers }));
    await once(client.socket as never, 'open');
    return client;
  }

  /** The status with which an upgrade is refused. */
  static async refused(url: string, headers: Record<string, string> = {}): Promise<number> {
    const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/responses`, { headers });
    socket.on('error', () => {});
    const [, response] = (await once(socket as never, 'unexpected-response')) as [unknown, { statusCode: number }];
    socket.terminate();
    return response.statusCode;
  }

  send(frame: object): void {
    this.socket.send(JSON.stringify(frame));
  }

  create(fields: object): void {
    this.send({ type: 'response.create', model: 'pocket-r1', ...fields });
  }

  /** The first frame that is so, waited for. */
  async until(is: (frame: any) => boolean): Promise<any> {
    for (;;) {
      const found = this.all.find(is);
      if (found) return found;
      await new Promise<void>((resolve, reject) => {
        const shown = (): string =>
          JSON.stringify(this.all.map(({ type, stream_id: lane }) => [type, lane]).slice(-20));
        const timer = setTimeout(() => reject(new Error(`no such frame; the last ones are ${shown()}`)), 20_000);
        const wake = (): void => {
          clearTimeout(timer);
          this.#waiting.delete(wake);
          resolve();
        };
        this.#waiting.add(wake);
      });
    }
  }

  /** The last response of a lane, when so many of the lane have ended. */
  async ended(streamId?: string, num = 1): Promise<any> {
    const isLast = (frame: any): boolean =>
      frame.stream_id === streamId && /^response\.(completed|incomplete|failed)$/.test(frame.type);
    await this.until(() => this.all.filter(isLast).length >= num);
    return this.all.filter(isLast)[num - 1].response;
  }

  /** The next error frame, taken out. */
  async error(): Promise<any> {
    const frame = await this.until(({ type }) => type === 'error');
    this.all.splice(this.all.indexOf(frame), 1);
    return frame;
  }

  /** Frames of one lane. */
  of(streamId: string | undefined): any[] {
    return this.all.filter((frame) => frame.stream_id === streamId);
  }

  async close(): Promise<void> {
    this.socket.close();
    assert.ok(await this.closed);
  }
}
