//! The pause of a [`Worker`]: it completes the requests that have begun, describes its connections, and waits.

use std::{
    io,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use blkdev::Channel;

use super::{Worker, conn::Why, handle::Standstill};
use crate::{handover::Pause, lines::Grant, turns::Connections};

/// Pause between two looks at the devices.
const BRIEFLY: Duration = Duration::from_micros(100);

/// Time to answer the last requests of clients that cannot be handed over.
const FAREWELL: Duration = Duration::from_millis(500);

impl Worker {
    /// Pauses until the sender of its orders is dropped.
    #[cold]
    pub(super) fn pause(&mut self, pause: &Pause<Standstill>) {
        let drained = self.drain(pause.deadline).map(|()| self.floor.suspend());
        if pause.report.send(drained).is_err() {
            return;
        }
        while let Some(done) = pause.order(|| self.stop.load(Ordering::Relaxed)) {
            self.dismiss();
            drop(done);
        }
        // Events of the pause are still in the poll set; only time has passed.
        self.now = Instant::now();
        self.turns.restart_paces();
    }

    /// Waits until no request is at a device and all kept changes are durable, and sends the replies. Begins no request.
    fn drain(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            self.now = Instant::now();
            self.floor.lanes.iter_mut().flatten().for_each(|lane| lane.channel.tick(self.now));
            let count = self.floor.reap(&mut self.turns);
            self.floor.output(&self.poll, &mut self.turns);
            // What a queue keeps would be lost with this process.
            let is_busy =
                |channel: &mut Channel| channel.in_flight() > 0 || channel.awaits_device() || channel.relieve();
            let mut lanes = self.floor.lanes.iter_mut().flatten();
            let Some(busy) = lanes.find_map(|lane| is_busy(&mut lane.channel).then_some(&lane.channel)) else {
                return Ok(());
            };
            if self.now >= deadline {
                let text = format!("{}: the device did not complete its requests in time", busy.info().target);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            if count == 0 {
                thread::sleep(BRIEFLY);
            }
        }
    }

    /// Disconnects clients that cannot be handed over. What they have sent already gets ESHUTDOWN.
    fn dismiss(&mut self) {
        let leaves = |number: &u32| {
            let conn = self.floor.conns[*number as usize].as_ref();
            conn.is_some_and(|conn| conn.suspend().is_none() || self.floor.is_leaving(conn.lane))
        };
        let leaving: Vec<u32> = (0..self.floor.conns.len() as u32).filter(leaves).collect();
        for &number in &leaving {
            if let Some(conn) = &mut self.floor.conns[number as usize] {
                conn.session.refuse();
                conn.readable = true;
            }
            if self.floor.feed(number, &mut Grant::ALL.clone()).is_none() {
                self.turns.leave(number);
            }
        }
        // The last piece of a payload may have completed a WRITE.
        if let Err(error) = self.drain(Instant::now() + FAREWELL) {
            log::warn!("{error}");
        }
        for number in leaving {
            self.floor.bury(number, &mut self.turns, Why::Stopping);
        }
    }
}
