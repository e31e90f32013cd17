//! The models of the node as the listeners know them: names, routes, and who waits or runs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::TrafficSpec;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::card::ModelCard;
use super::expected::Expected;
use super::keep_alive::KeepAlive;
use crate::api::LATEST;

/// A model that the agent answers for.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishedModel {
    /// Uid of the ModelDeployment.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name that clients ask for.
    pub served_name: String,
    /// Its LoRA adapters, each asked for behind one of the model's names and a colon.
    pub adapters: Vec<String>,
    /// Queue and time limits.
    pub traffic: TrafficSpec,
}

impl PublishedModel {
    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether `asked` means this model or one of its adapters, on its own port.
    fn answers_to(&self, asked: &str) -> bool {
        self.is_called(asked) || self.of_adapter(asked).is_some_and(|model| self.is_called(model))
    }

    /// What stands before one of its adapters and a colon.
    fn of_adapter<'a>(&self, asked: &'a str) -> Option<&'a str> {
        let (model, adapter) = asked.rsplit_once(':')?;
        self.adapters.iter().any(|name| name == adapter).then_some(model)
    }

    fn is_called(&self, asked: &str) -> bool {
        asked == self.served_name
            || asked == self.name
            || asked.split_once('/').is_some_and(|(namespace, name)| namespace == self.namespace && name == self.name)
    }

    pub(super) fn queue_timeout(&self) -> Duration {
        seconds(self.traffic.queue_timeout_seconds)
    }

    pub(super) fn request_timeout(&self) -> Duration {
        seconds(self.traffic.request_timeout_seconds)
    }

    pub(super) fn max_queued(&self) -> u32 {
        u32::try_from(self.traffic.max_queued).unwrap_or(0)
    }
}

fn seconds(number: i32) -> Duration {
    Duration::from_secs(u64::try_from(number).unwrap_or(0).max(1))
}

/// Where requests for a model go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// A worker listens on this socket.
    Ready {
        /// Unix socket.
        socket: PathBuf,
    },
    /// No worker; a request asks for one and waits.
    Unloaded,
    /// A worker is on its way; requests wait.
    Loading,
    /// The model leaves this node; new requests are sent away.
    Draining,
    /// The model cannot be served.
    Unavailable {
        /// A word, such as `InsufficientMemory`.
        reason: String,
        /// For people.
        message: String,
    },
}

/// A route, and which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Counts the routes that the model had: connections to the worker of an earlier one are not used again.
    pub(super) turn: u64,
    pub(super) route: Route,
}

/// Requests of a model at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests that a worker has.
    pub running: u32,
    /// Requests that wait for a worker.
    pub waiting: u32,
    /// When the last request began or ended; `None`: there was none yet.
    pub last_request: Option<Instant>,
    /// What the last client that said so wants, since the model was last unloaded.
    pub keep_alive: Option<KeepAlive>,
}

/// A model and its state, shared by its listener, the shared port and the requests under way.
pub(super) struct Model {
    published: RwLock<Arc<PublishedModel>>,
    pub(super) port: u16,
    route: watch::Sender<Told>,
    running: AtomicU32,
    waiting: AtomicU32,
    last_request: Mutex<Option<Instant>>,
    expected: Mutex<Expected>,
    keep_alive: Mutex<Option<KeepAlive>>,
    card: RwLock<Arc<ModelCard>>,
    /// Whether the owner of the front was told that a request waits, since the route last changed.
    woken: AtomicBool,
    activity: watch::Sender<u64>,
    /// Ends the listener of the model's port.
    pub(super) stop: CancellationToken,
    /// Ends its connections, whatever they do.
    pub(super) kill: CancellationToken,
}

impl Model {
    /// `stop` and `kill` are this model's own, children of the front's.
    pub(super) fn new(
        published: PublishedModel,
        port: u16,
        activity: watch::Sender<u64>,
        stop: CancellationToken,
        kill: CancellationToken,
    ) -> Self {
        Self {
            published: RwLock::new(Arc::new(published)),
            port,
            route: watch::Sender::new(Told { turn: 0, route: Route::Loading }),
            running: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            last_request: Mutex::new(None),
            expected: Mutex::default(),
            keep_alive: Mutex::new(None),
            card: RwLock::default(),
            woken: AtomicBool::new(false),
            activity,
            stop,
            kill,
        }
    }

    pub(super) fn published(&self) -> Arc<PublishedModel> {
        Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn publish(&self, published: PublishedModel) {
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(published);
    }

    /// Every call counts as a change, the same socket too: its worker is another one.
    pub(super) fn set_route(&self, route: Route) {
        self.woken.store(false, Ordering::Release);
        if route == Route::Unloaded {
            *self.keep_alive.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.route.send_modify(|told| *told = Told { turn: told.turn.wrapping_add(1), route });
    }

    pub(super) fn told(&self) -> watch::Receiver<Told> {
        self.route.subscribe()
    }

    pub(super) fn route(&self) -> Route {
        self.route.borrow().route.clone()
    }

    pub(super) fn activity(&self) -> Activity {
        Activity {
            running: self.running.load(Ordering::Acquire),
            waiting: self.waiting.load(Ordering::Acquire),
            last_request: *self.last_request.lock().unwrap_or_else(PoisonError::into_inner),
            keep_alive: *self.keep_alive.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// What is known of it beside its names.
    pub(super) fn card(&self) -> Arc<ModelCard> {
        Arc::clone(&self.card.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn describe(&self, card: ModelCard) {
        let mut known = self.card.write().unwrap_or_else(PoisonError::into_inner);
        if **known != card {
            *known = Arc::new(card);
        }
    }

    /// A client said how long the model is to stay; `None` says nothing.
    pub(super) fn keep(&self, keep_alive: Option<KeepAlive>) {
        if keep_alive.is_some() {
            *self.keep_alive.lock().unwrap_or_else(PoisonError::into_inner) = keep_alive;
            self.activity.send_modify(|version| *version = version.wrapping_add(1));
        }
    }

    pub(super) fn expect(&self, expected: Expected) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = expected;
    }

    /// Seconds after which a request that is sent away now may come again.
    pub(super) fn retry_after(&self) -> u32 {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).retry_after(Instant::now())
    }

    /// Whether the owner is to be told now that a request waits.
    pub(super) fn wants_wake(&self) -> bool {
        !self.woken.swap(true, Ordering::AcqRel)
    }

    /// The wake could not be delivered: the next one who waits tries again.
    pub(super) fn wake_failed(&self) {
        self.woken.store(false, Ordering::Release);
    }

    fn touch(&self) {
        *self.last_request.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.activity.send_modify(|version| *version = version.wrapping_add(1));
    }
}

/// A request under way; counted in one of the two numbers until it is dropped.
pub(super) struct InFlight {
    model: Arc<Model>,
    is_running: bool,
    keep_alive: Option<KeepAlive>,
}

impl InFlight {
    /// Counts a request that waits; the number of those that wait with it is for the caller to judge.
    pub(super) fn begin(model: Arc<Model>) -> (Self, u32) {
        let before = model.waiting.fetch_add(1, Ordering::AcqRel);
        model.touch();
        (Self { model, is_running: false, keep_alive: None }, before)
    }

    /// How long the model is to stay loaded after this request. Said again at its end: the model may have been unloaded
    /// and loaded in between.
    pub(super) fn keep(&mut self, keep_alive: Option<KeepAlive>) {
        self.keep_alive = keep_alive;
        self.model.keep(keep_alive);
    }

    pub(super) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The request is with a worker now.
    pub(super) fn run(&mut self) {
        self.count(true);
    }

    /// The request waits again.
    pub(super) fn wait(&mut self) {
        self.count(false);
    }

    fn count(&mut self, is_running: bool) {
        if std::mem::replace(&mut self.is_running, is_running) != is_running {
            let (from, to) = if is_running {
                (&self.model.waiting, &self.model.running)
            } else {
                (&self.model.running, &self.model.waiting)
            };
            // First up, then down: whoever looks between sees one too many, never an idle model.
            to.fetch_add(1, Ordering::AcqRel);
            from.fetch_sub(1, Ordering::AcqRel);
            self.model.touch();
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let counter = if self.is_running { &self.model.running } else { &self.model.waiting };
        counter.fetch_sub(1, Ordering::AcqRel);
        self.model.keep(self.keep_alive);
        self.model.touch();
    }
}

/// Models by uid.
#[derive(Default)]
pub(super) struct Table {
    pub(super) models: HashMap<String, Arc<Model>>,
}

/// Why a name leads to no model.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    NotFound,
    /// More than one model has it: these, by their full names.
    Ambiguous(Vec<String>),
}

impl Table {
    /// The model that `asked` means on the shared port: `namespace/name`, or a served name or name that only one has;
    /// each also with Ollama's tag for "the one there is", or the name of one of its adapters, behind a colon.
    pub(super) fn resolve(&self, asked: &str) -> Result<Arc<Model>, Lookup> {
        let of_model = self.resolve_exactly(asked);
        let Err(Lookup::NotFound) = of_model else { return of_model };
        let (name, _) = asked.rsplit_once(':').ok_or(Lookup::NotFound)?;
        let model = self.resolve_exactly(name)?;
        let known = asked.ends_with(LATEST) || model.published().of_adapter(asked).is_some();
        if known { Ok(model) } else { Err(Lookup::NotFound) }
    }

    fn resolve_exactly(&self, asked: &str) -> Result<Arc<Model>, Lookup> {
        let full = self.models.values().find(|model| model.published().full_name() == asked);
        if let Some(model) = full {
            return Ok(Arc::clone(model));
        }
        for matches in
            [(|model, asked| model.served_name == *asked) as fn(&PublishedModel, &str) -> bool, |model, asked| {
                model.name == *asked
            }]
        {
            let found: Vec<_> = self.models.values().filter(|model| matches(&model.published(), asked)).collect();
            match found.as_slice() {
                [] => {}
                [one] => return Ok(Arc::clone(one)),
                several => {
                    let mut names: Vec<_> = several.iter().map(|model| model.published().full_name()).collect();
                    names.sort_unstable();
                    return Err(Lookup::Ambiguous(names));
                }
            }
        }
        Err(Lookup::NotFound)
    }

    /// All models, by their full names.
    pub(super) fn sorted(&self) -> Vec<Arc<Model>> {
        let mut models: Vec<_> = self.models.values().cloned().collect();
        models.sort_by_cached_key(|model| model.published().full_name());
        models
    }
}

/// Whether a request on the model's own port may say `asked`.
pub(super) fn is_for(model: &PublishedModel, asked: Option<&str>) -> bool {
    asked.is_none_or(|asked| model.answers_to(asked) || asked.strip_suffix(LATEST).is_some_and(|a| model.answers_to(a)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(uid: &str, namespace: &str, name: &str, served_name: &str) -> PublishedModel {
        let own = str::to_owned;
        let traffic = TrafficSpec::default();
        PublishedModel {
            uid: own(uid),
            namespace: own(namespace),
            name: own(name),
            served_name: own(served_name),
            adapters: vec![own("terse")],
            traffic,
        }
    }

    fn model(published: PublishedModel) -> Arc<Model> {
        let token = CancellationToken::new();
        Arc::new(Model::new(published, 1, watch::Sender::new(0), token.clone(), token))
    }

    #[test]
    fn names_lead_to_one_model_or_say_why_not() {
        let all = [
            published("1", "a", "toy", "llama"),
            published("2", "b", "toy", "qwen"),
            published("3", "b", "llama", "llama"),
            published("4", "b", "qwen", "other"),
        ];
        let models = all.map(|published| (published.uid.clone(), model(published)));
        let table = Table { models: models.into_iter().collect() };
        let two = |a: &str, b: &str| Err(Lookup::Ambiguous(vec![a.to_owned(), b.to_owned()]));
        let cases = [
            ("a/toy", Ok("1")),
            ("b/toy", Ok("2")),
            ("b/llama", Ok("3")),
            ("toy", two("a/toy", "b/toy")),
            ("llama", two("a/toy", "b/llama")),
            ("other", Ok("4")),
            ("other:latest", Ok("4")),
            ("a/toy:latest", Ok("1")),
            ("toy:latest", two("a/toy", "b/toy")),
            ("other:7b", Err(Lookup::NotFound)),
            ("other:latest:latest", Err(Lookup::NotFound)),
            // The served name of one goes before the name of another.
            ("qwen", Ok("2")),
            ("b/toy:terse", Ok("2")),
            ("qwen:terse", Ok("2")),
            ("toy:terse", two("a/toy", "b/toy")),
            ("qwen:loud", Err(Lookup::NotFound)),
            ("c/toy", Err(Lookup::NotFound)),
            ("", Err(Lookup::NotFound)),
        ];
        for (asked, expected) in cases {
            let got = table.resolve(asked).map(|model| model.published().uid.clone());
            assert_eq!(got, expected.map(str::to_owned), "{asked}");
        }
    }

    #[test]
    fn a_models_own_port_takes_all_its_names() {
        let toy = published("1", "ml", "toy", "Toy Chat");
        for good in [
            None,
            Some("toy"),
            Some("ml/toy"),
            Some("Toy Chat"),
            Some("toy:latest"),
            Some("ml/toy:latest"),
            Some("Toy Chat:terse"),
            Some("ml/toy:terse"),
        ] {
            assert!(is_for(&toy, good), "{good:?}");
        }
        for bad in ["", "TOY", "other/toy", "ml/toy/x", "gpt-4", ":latest", "toy:7b", "toy:", "toy:loud", ":terse"] {
            assert!(!is_for(&toy, Some(bad)), "{bad}");
        }
    }

    #[test]
    fn requests_are_counted_where_they_are() {
        let model = model(published("1", "ml", "toy", "toy"));
        let counts = || (model.activity().waiting, model.activity().running);
        assert_eq!(model.activity().last_request, None);
        let (mut first, before) = InFlight::begin(model.clone());
        let (second, more) = InFlight::begin(model.clone());
        assert_eq!((before, more, counts()), (0, 1, (2, 0)));
        first.run();
        first.run();
        assert_eq!(counts(), (1, 1));
        first.wait();
        assert_eq!(counts(), (2, 0));
        first.run();
        drop((first, second));
        assert_eq!(counts(), (0, 0));
        assert!(model.activity().last_request.is_some());
    }

    #[test]
    fn what_a_client_keeps_goes_with_the_worker() {
        let model = model(published("1", "ml", "toy", "toy"));
        let (mut first, _) = InFlight::begin(model.clone());
        first.keep(Some(KeepAlive::Forever));
        let (mut second, _) = InFlight::begin(model.clone());
        second.keep(None);
        assert_eq!(model.activity().keep_alive, Some(KeepAlive::Forever), "who says nothing changes nothing");
        model.set_route(Route::Unloaded);
        assert_eq!(model.activity().keep_alive, None);
        // It was still on its way: its wish is for the worker that it wakes.
        drop(first);
        assert_eq!(model.activity().keep_alive, Some(KeepAlive::Forever));
        drop(second);
        assert_eq!(model.activity().keep_alive, Some(KeepAlive::Forever));
    }

    #[test]
    fn one_wake_until_the_route_changes() {
        let model = model(published("1", "ml", "toy", "toy"));
        assert!(model.wants_wake());
        assert!(!model.wants_wake());
        model.set_route(Route::Unloaded);
        assert!(model.wants_wake());
        model.wake_failed();
        assert!(model.wants_wake());
    }
}
