"""Word lists of the demo world, all written for it by hand."""

from __future__ import annotations


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, _, right in (pair.partition("-") for pair in text.split()))


NOUNS: tuple[str, ...] = _list("""
    apple arm bag ball banana basket beach bed bell bench berry bike bird boat book bottle bowl box branch bridge
    brush bucket bus bush button cabin camel camera candle candy car card carrot castle cat chair cherry church city
    class clock cloud coat coin comb cookie corner couch cow crab cross crown cup curtain daisy desk diary dish dog
    doll door dragon dress drum duck eagle engine fairy farm fence ferry field finger flag flower forest fork fox
    friend frog garden gate ghost gift glass glove goat grape guitar hammer hand hat hill honey horse hotel house inch
    island jacket jar jelly jewel kettle key king kitchen kite ladder lady lake lamp lemon lily lion lock lunch
    magnet map market mask match melon mirror monkey moon mountain nail napkin needle nest nurse ocean office onion
    orange oven owl paint panda paper parcel park party path peach pear pencil penny pepper phone piano picture pig
    pillow pilot planet plant plate pocket poem pond pony puppet puppy queen rabbit radio ring river road
    robot rocket roof room rope rose sailor salad sandwich school seed shark ship shirt shop sister sketch
    sock song spider spoon spy star stone storm story street student sugar suit switch table tailor tax temple tent
    tiger torch towel tower toy train tree truck tunnel turtle uncle valley violin wagon wall watch whale wheel
    window wing witch wizard yard zebra
    """)

VERBS: tuple[str, ...] = _list("""
    accept admire agree answer arrive ask bake bathe behave blink boil borrow brush call camp carry chase cheer chew
    clean climb close collect cook copy count cover cross cry dance deliver dress drop dry dust empty enjoy enter
    explain fasten fetch fill film finish fix float fold follow fry gather glue greet guess guide hate help hope
    hunt hurry invite iron jog jump kick kiss knock land laugh learn lift like listen live load lock look love
    marry measure mend miss mix move nod open order own pack paint park pass peel phone pick plant play point polish
    pour praise press print promise pull push race rain reach repair rescue rest return roll rub rush sail save
    scratch search serve share shout skate smell smile smoke sneeze sniff snore spoil squeeze stare stay step stir
    stop study talk tap taste tease thank tidy touch trade train trust try tug turn type use visit wait walk
    want warn wash waste watch water wave whisper whistle wink wipe wish wonder work worry wrap yawn zip
    """)

NAMES: tuple[str, ...] = _list("""
    Ada Alan Alice Amir Anna Ben Bruno Carla Clara Daniel David Diana Elena Emma Eric Eva Felix Fiona Frank Greta Grace
    Hana Harry Hugo Ida Ines Ivan Jack Jane Jonas Julia Kate Kevin Lara Leo Lina Louis Lucy Luke Maria Mark Martin Mia
    Milo Nadia Nina Noah Nora Olga Oscar Paul Peter Petra Quinn Rita Robert Rosa Ruth Sam Sara Simon Sofia Tara Theo
    Tim Tom Uma Vera Victor Walter Wanda Zoe
    """)

COLOURS: tuple[str, ...] = _list("red blue green yellow black white brown purple pink grey golden silver")

# Verbs that make sense with a thing, for the little sentences: they take -s and -ed by the ordinary rules.
SENTENCE_VERBS: tuple[str, ...] = _list("""
    wash carry paint clean pull push fix open watch drop lift touch move pack want like guard borrow collect cover
    fill kick love mend polish save share trade use visit wrap copy
    """)

PLACES: tuple[str, ...] = _list("park kitchen garden school forest market harbour castle village tunnel")
MANNERS: tuple[str, ...] = _list("slowly quickly quietly gladly often alone twice again")

ANTONYMS: tuple[tuple[str, str], ...] = _pairs("""
    hot-cold up-down wet-dry fast-slow hard-soft happy-sad rich-poor young-old light-heavy day-night early-late
    empty-full open-shut loud-quiet thick-thin strong-weak high-low clean-dirty sweet-sour sharp-blunt brave-timid
    near-far inside-outside always-never love-hate push-pull win-lose buy-sell begin-end enter-exit rise-fall
    laugh-cry friend-enemy war-peace true-false safe-risky wide-narrow deep-shallow smooth-rough tight-loose
    north-south east-west left-right summer-winter sunrise-sunset front-back top-bottom give-take arrive-depart
    remember-forget accept-refuse attack-defend alive-dead asleep-awake ancient-modern cheap-costly polite-rude
    simple-complex hero-villain victory-defeat arise-sink lend-borrow before-after floor-ceiling guilty-innocent
    increase-decrease male-female kind-cruel public-private bright-dim tall-tiny visible-hidden lazy-busy
    """)

FRENCH: dict[str, str] = dict(
    _pairs("""
    dog-chien cat-chat house-maison book-livre water-eau bread-pain milk-lait apple-pomme tree-arbre flower-fleur
    bird-oiseau fish-poisson horse-cheval cow-vache sun-soleil moon-lune star-étoile sky-ciel sea-mer river-rivière
    mountain-montagne forest-forêt garden-jardin street-rue city-ville school-école teacher-professeur friend-ami
    brother-frère sister-soeur mother-mère father-père child-enfant boy-garçon girl-fille man-homme woman-femme
    king-roi queen-reine hand-main foot-pied head-tête eye-oeil nose-nez mouth-bouche ear-oreille hair-cheveux
    heart-coeur table-table chair-chaise door-porte window-fenêtre bed-lit room-chambre kitchen-cuisine key-clé
    car-voiture train-train boat-bateau plane-avion bicycle-vélo road-route bridge-pont church-église cheese-fromage
    butter-beurre egg-oeuf meat-viande chicken-poulet sugar-sucre salt-sel pepper-poivre wine-vin beer-bière
    tea-thé coffee-café cup-tasse glass-verre plate-assiette knife-couteau fork-fourchette spoon-cuillère shirt-chemise
    shoe-chaussure hat-chapeau coat-manteau dress-robe red-rouge blue-bleu green-vert black-noir white-blanc
    yellow-jaune big-grand small-petit happy-heureux sad-triste good-bon bad-mauvais new-nouveau winter-hiver
    summer-été spring-printemps autumn-automne morning-matin night-nuit week-semaine month-mois year-année
    snow-neige rain-pluie wind-vent fire-feu stone-pierre
    """)
)

CAPITALS: dict[str, str] = dict(
    _pairs("""
    France-Paris Spain-Madrid Italy-Rome Germany-Berlin Portugal-Lisbon Greece-Athens Austria-Vienna Poland-Warsaw
    Hungary-Budapest Norway-Oslo Sweden-Stockholm Ireland-Dublin England-London
    Wales-Cardiff Belgium-Brussels Switzerland-Bern Russia-Moscow Ukraine-Kyiv Turkey-Ankara
    Egypt-Cairo Kenya-Nairobi Ghana-Accra Nigeria-Abuja Morocco-Rabat Tunisia-Tunis Libya-Tripoli Senegal-Dakar
    Japan-Tokyo China-Beijing India-Delhi Thailand-Bangkok Vietnam-Hanoi
    Korea-Seoul
    Iran-Tehran Iraq-Baghdad Syria-Damascus Lebanon-Beirut Jordan-Amman Qatar-Doha Oman-Muscat Canada-Ottawa
    Angola-Luanda Cuba-Havana Jamaica-Kingston Peru-Lima Chile-Santiago Brazil-Brasilia Ecuador-Quito Colombia-Bogota
    Venezuela-Caracas Bolivia-Sucre Serbia-Belgrade
    Croatia-Zagreb Bulgaria-Sofia Albania-Tirana Estonia-Tallinn Latvia-Riga
    Cyprus-Nicosia Malta-Valletta Indonesia-Jakarta Armenia-Yerevan Georgia-Tbilisi
    """)
)

_ONSETS = _list("b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sh sl sn sp st t th tr v w y z")
_NUCLEI = _list("a e i o u a e i o u ai ea ee oa oo ou")
_CODAS = _list("b ck d f g l ll m mp n nd nk p r rk s sh st t th x ch y le er")
SYLLABLES: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = (_ONSETS, _NUCLEI, _CODAS)

# Ordinary talk in the words that requests share; none of it asks for a task.
SMALL_TALK: tuple[str, ...] = (
    "What is the matter with you?",
    "Tell me about the weather here.",
    "Give me a moment, please.",
    "Please help me with this.",
    "How do you do?",
    "How is it going today?",
    "Which one is for me?",
    "Who is it?",
    "Can you tell me what this is about?",
    "Here is what I have for you.",
    "Say what you would like.",
    "What do you get if you do that?",
    "Find out what it is.",
    "Write to me, please.",
    "Name one of the things in it.",
    "I would like to do this with you.",
    "Hello! What is that?",
    "Quick question: What would you do?",
    "Thanks. It is all there.",
    "Thank you! Have you been there?",
    "Is this the one that you do not have?",
    "Put it in here.",
    "Take it from me and give it to them.",
    "Make it so, please.",
    "What did I tell you?",
    "Here is one: this.",
    "Which of the two do you need?",
    "Only if you would like to.",
    "Turn it into something.",
    "If there is more, tell me.",
    "How would you do it with the others?",
    "What does it have to be?",
    "What are you called?",
    "Where is it? Is it here or there?",
    "So what do you have for me from them?",
    "give me the one at the top, please",
    "what is this for",
    "tell me how it is",
    "Where do I find the others, and for how long?",
    "He has it, and she has the other one.",
)
