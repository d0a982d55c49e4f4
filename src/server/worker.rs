//! The thread that owns the engine, and the handle by which the rest of the server reaches it.
//!
//! The thread takes commands between steps and sends each event to the request's own channel. The channels have no bound, so that it
//! never waits for a client; what they hold is bounded by `max_tokens`, and by how many requests are admitted at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::engine::{Engine, Event, Load, Request, RequestId};
use crate::error::{Error, Result};

use super::error::ApiError;

/// An event, and when it happened.
#[derive(Debug)]
pub(super) struct Timed {
    pub(super) at: Instant,
    pub(super) event: Event,
}

/// A request's number outside the engine, known before the engine has taken it.
type Ticket = u64;

enum Command {
    Submit {
        ticket: Ticket,
        request: Box<Request>,
        events: mpsc::UnboundedSender<Timed>,
        taken: oneshot::Sender<Result<()>>,
    },
    Abort {
        ticket: Ticket,
        choice: Option<usize>,
    },
    Drain,
    /// End now, whatever runs.
    Stop,
}

/// Whether the engine works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Health {
    Working,
    /// It has no requests and takes none, as it was told.
    Drained,
    /// Why it takes no more.
    Broken(String),
}

/// What the thread tells everybody.
#[derive(Debug)]
struct Shared {
    load: Mutex<Load>,
    health: watch::Sender<Health>,
}

impl Shared {
    fn set_health(&self, health: Health) {
        self.health.send_replace(health);
    }
}

/// The engine, from any thread.
#[derive(Debug)]
pub(super) struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    next_ticket: AtomicU64,
    places: Arc<Semaphore>,
    capacity: usize,
}

/// Starts the thread. `capacity` sequences are admitted at once, running and waiting.
///
/// # Errors
/// `Io` when the system refuses a thread.
pub(super) fn start(engine: Engine, capacity: usize) -> Result<(EngineHandle, JoinHandle<()>)> {
    let (commands, inbox) = channel();
    let health = watch::Sender::new(Health::Working);
    let shared = Arc::new(Shared { load: Mutex::new(engine.load()), health });
    let mut worker = Worker {
        engine,
        inbox,
        requests: HashMap::new(),
        ids: HashMap::new(),
        shared: Arc::clone(&shared),
        is_draining: false,
        is_stopped: false,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker.run());
    let thread = thread.map_err(Error::io("engine thread"))?;
    let places = Arc::new(Semaphore::new(capacity));
    Ok((EngineHandle { commands, shared, next_ticket: AtomicU64::new(0), places, capacity }, thread))
}

impl EngineHandle {
    /// How busy it is, as of its last step.
    pub(super) fn load(&self) -> Load {
        *self.shared.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sequences that are admitted at once.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether it works, and word when that changes.
    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.shared.health.subscribe()
    }

    /// Takes no more requests; becomes [`Health::Drained`] when it has finished those it has.
    pub(super) fn drain(&self) {
        // Where the thread has ended its health tells so.
        let _ = self.commands.send(Command::Drain);
    }

    /// Ends the thread after the step that it computes; requests that are left fail.
    pub(super) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    /// Places for `sequences`, held until what is returned is dropped.
    ///
    /// # Errors
    /// 429 when the queue is full, 400 when it never has room for that many.
    pub(super) fn admit(&self, sequences: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        if sequences > self.capacity {
            return Err(ApiError::invalid(
                "n",
                format!("{sequences} sequences, and the server holds {} at once", self.capacity),
            ));
        }
        let places = Arc::clone(&self.places).try_acquire_many_owned(sequences as u32);
        places.map_err(|_| {
            ApiError::overloaded(format!("{} sequences are running or waiting already; try again later", self.capacity))
        })
    }

    /// Hands a request to the engine and waits until it is taken.
    ///
    /// # Errors
    /// The engine's own.
    pub(super) async fn submit(
        self: &Arc<Self>,
        request: Request,
        place: OwnedSemaphorePermit,
    ) -> Result<Running, ApiError> {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let (events, receiver) = mpsc::unbounded_channel();
        let (taken, reply) = oneshot::channel();
        // From here on whoever stops to wait has aborted the request.
        let running = Running { ticket, receiver, engine: Arc::clone(self), _place: place };
        let command = Command::Submit { ticket, request: Box::new(request), events, taken };
        let stopped = || ApiError::unavailable("the engine has stopped");
        self.commands.send(command).map_err(|_| stopped())?;
        reply.await.map_err(|_| stopped())??;
        Ok(running)
    }
}

/// A request in the engine. Dropping it aborts what is left of it.
#[derive(Debug)]
pub(super) struct Running {
    ticket: Ticket,
    receiver: mpsc::UnboundedReceiver<Timed>,
    engine: Arc<EngineHandle>,
    _place: OwnedSemaphorePermit,
}

impl Running {
    /// The next event; `None` after the last one.
    pub(super) async fn next(&mut self) -> Option<Timed> {
        self.receiver.recv().await
    }

    /// Drops one choice; the others go on.
    pub(super) fn abort_choice(&self, choice: usize) {
        let _ = self.engine.commands.send(Command::Abort { ticket: self.ticket, choice: Some(choice) });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.engine.commands.send(Command::Abort { ticket: self.ticket, choice: None });
    }
}

struct InFlight {
    ticket: Ticket,
    events: mpsc::UnboundedSender<Timed>,
    /// Which of its choices have not ended.
    live: Vec<bool>,
}

struct Worker {
    engine: Engine,
    inbox: Receiver<Command>,
    requests: HashMap<RequestId, InFlight>,
    ids: HashMap<Ticket, RequestId>,
    shared: Arc<Shared>,
    is_draining: bool,
    is_stopped: bool,
}

impl Worker {
    fn run(&mut self) {
        // Requests would wait for ever for a thread that has panicked.
        let _guard = PanicGuard(Arc::clone(&self.shared));
        while !self.is_stopped {
            if self.engine.is_idle() {
                if self.is_draining {
                    self.shared.set_health(Health::Drained);
                    return;
                }
                let Ok(command) = self.inbox.recv() else { return };
                self.obey(command);
            }
            loop {
                match self.inbox.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let events = self.engine.step();
            let at = Instant::now();
            for event in events {
                self.deliver(at, event);
            }
            *self.shared.load.lock().unwrap_or_else(PoisonError::into_inner) = self.engine.load();
            if let Some(reason) = self.engine.fault() {
                self.shared.set_health(Health::Broken(reason.to_owned()));
                return;
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { ticket, request, events, taken } => {
                let live = vec![true; request.n];
                let result = self.engine.submit(*request);
                if let Ok(id) = result {
                    self.requests.insert(id, InFlight { ticket, events, live });
                    self.ids.insert(ticket, id);
                }
                // Whoever no longer waits has sent an abort.
                let _ = taken.send(result.map(|_| ()));
            }
            Command::Abort { ticket, choice } => {
                let Some(&id) = self.ids.get(&ticket) else { return };
                match choice {
                    Some(choice) => {
                        self.engine.abort_choice(id, choice);
                        self.end(id, choice);
                    }
                    None => {
                        self.engine.abort(id);
                        self.forget(id);
                    }
                }
            }
            Command::Drain => {
                self.engine.drain();
                self.is_draining = true;
            }
            Command::Stop => self.is_stopped = true,
        }
    }

    fn deliver(&mut self, at: Instant, event: Event) {
        let (id, ended) = match &event {
            Event::Prompt { id, .. } | Event::Token { id, .. } => (*id, None),
            Event::Finished { id, choice, .. } => (*id, Some(Some(*choice))),
            Event::Failed { id, .. } => (*id, Some(None)),
        };
        if let Some(InFlight { events, .. }) = self.requests.get(&id) {
            // A receiver that is gone has sent an abort.
            let _ = events.send(Timed { at, event });
        }
        match ended {
            Some(Some(choice)) => self.end(id, choice),
            Some(None) => self.forget(id),
            None => {}
        }
    }

    /// Records that a choice has ended; the request is forgotten with its last.
    fn end(&mut self, id: RequestId, choice: usize) {
        let Some(InFlight { live, .. }) = self.requests.get_mut(&id) else { return };
        if let Some(live) = live.get_mut(choice) {
            *live = false;
        }
        if !live.contains(&true) {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: RequestId) {
        if let Some(InFlight { ticket, .. }) = self.requests.remove(&id) {
            self.ids.remove(&ticket);
        }
    }
}

struct PanicGuard(Arc<Shared>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_health(Health::Broken("the engine's thread panicked: this is a bug".into()));
        }
    }
}
