"""Domains of general knowledge: animals and cities. Word lists of our own; the facts are common knowledge."""

from ltdi_peft.suite.design import Domain, alone, grouped, question

_ANIMALS = grouped(
    "kind legs moves",
    """
    mammal four walks: dog cat horse cow pig sheep goat donkey mule camel lion tiger leopard cheetah panther
    mammal four walks: wolf fox bear elephant giraffe zebra rhino hippo buffalo bison moose deer elk
    mammal four walks: antelope gazelle
    mammal four walks: rabbit hare mouse rat hamster squirrel beaver hedgehog badger weasel ferret skunk
    mammal four walks: raccoon
    mammal four walks: llama alpaca yak ox panda jaguar hyena jackal coyote lynx puma tapir mole chipmunk
    mammal two walks: monkey gorilla chimpanzee kangaroo gibbon
    mammal none swims: whale dolphin porpoise orca manatee seal walrus narwhal
    mammal two flies: bat
    bird two flies: eagle hawk falcon owl crow raven magpie sparrow robin swallow swift starling pigeon dove
    bird two flies: parrot
    bird two flies: canary finch wren thrush blackbird lark nightingale woodpecker kingfisher cuckoo stork
    bird two flies: heron crane
    bird two flies: seagull albatross pelican vulture condor kite buzzard kestrel jay macaw hummingbird
    bird two flies: toucan
    bird two flies: duck goose swan flamingo pheasant partridge quail puffin budgie
    bird two walks: hen rooster turkey ostrich emu peacock
    bird two swims: penguin
    fish none swims: salmon trout tuna cod herring sardine mackerel shark carp pike perch eel haddock
    fish none swims: halibut
    fish none swims: sole plaice bass catfish goldfish piranha anchovy swordfish stingray barracuda sturgeon
    fish none swims: tilapia
    fish none swims: snapper flounder turbot minnow guppy marlin grouper seahorse
    insect six flies: bee wasp hornet bumblebee fly mosquito butterfly moth dragonfly ladybird midge gnat
    insect six flies: mayfly
    insect six flies: horsefly damselfly lacewing firefly
    insect six crawls: ant beetle cockroach termite earwig flea louse bedbug weevil aphid
    insect six jumps: grasshopper cricket locust
    reptile none crawls: snake cobra python viper rattlesnake adder boa anaconda mamba
    reptile four crawls: lizard gecko iguana chameleon tortoise komodo_dragon skink
    reptile four swims: crocodile alligator turtle terrapin caiman
    amphibian four jumps: frog toad tree_frog bullfrog
    amphibian four crawls: salamander newt
    spider eight crawls: tarantula black_widow house_spider wolf_spider garden_spider
    """,
)
ANIMALS = Domain(
    "animals",
    _ANIMALS,
    (
        question(
            "kind",
            "kind",
            """Say what kind of animal this is.
               Name the animal group it belongs to.
               Is it a mammal, a bird, a fish, an insect or a reptile?
               Which class of animals is it in?
               Sort the animal into its class.
               Animal -> its class, such as mammal or insect.
               Could you tell me the zoological class, for example reptile or bird?
               I will name an animal; I need to know its group, such as fish.
               Classify it as amphibian, bird, fish, insect, spider, reptile or mammal.
               Which group is right for this animal: birds, mammals, fish? Name it in the singular.""",
            """What sort of creature is it: mammal, bird, fish, insect, reptile?
               Tell the biological group of the animal.""",
        ),
        question(
            "legs",
            "legs",
            """Say how many legs this animal has, as a word.
               How many legs does it stand on?
               Give the number of its legs in words.
               Count the legs of the animal.
               What is the animal's number of legs?
               Animal -> number of legs, spelled out.
               Could you let me know its leg total as a word, please?
               Here comes an animal; I would like its number of legs in letters, not digits.
               Two, four, six, eight or none: how many legs has it got?
               State in words how many legs such an animal normally has.""",
            """Tell the leg count of the creature as a word.
               On how many legs does the creature go?""",
        ),
        question(
            "moves",
            "moves",
            """Say how this animal moves.
               Does it walk, fly, swim, crawl or jump?
               How does the animal get from place to place?
               Name the way in which it moves about.
               What does it do to move: walks, flies, swims, crawls, jumps?
               Animal -> its motion: flies, walks, jumps, crawls or swims.
               Could you tell me how the animal gets about, for example "walks"?
               I have an animal in mind; give its usual locomotion, such as "swims".
               Usual way of moving, as one verb like crawls or flies.
               What is normal for this animal: it crawls, swims, jumps, flies or walks?""",
            """By which movement does the creature travel?
               Tell the creature's way of getting around.""",
        ),
    ),
    (
        alone(
            "riddle",
            lambda i: f"{i['kind']}, {i['legs']} legs",
            """Describe the animal by its kind and its legs.
               Give the kind, a comma, and how many legs.
               Write the class of the animal and then its legs.
               State the group and the number of legs.
               Tell the kind of animal and how many legs it has.
               First the animal's kind, then its leg number.
               Make a short card: kind, number of legs.
               Note the class and the count of legs.
               Animal -> "class, number legs", for example "bird, two legs".
               Could you write its group and leg number in the style "insect, six legs"?
               I will give you an animal; I need its class, a comma, its number and "legs".
               What class is the animal and how many legs has it, as in "mammal, four legs"?""",
            """Sum the creature up: group, then legs.
               Produce a card with class and legs of the creature.
               Kind first, legs after a comma.""",
        ),
    ),
)

_CITIES = grouped(
    "country continent capital language",
    """
    France Europe Paris French: Lyon Marseille Nice Bordeaux Toulouse Lille Nantes Strasbourg
    Germany Europe Berlin German: Munich Hamburg Frankfurt Cologne Stuttgart Dresden Leipzig Bremen
    Italy Europe Rome Italian: Milan Venice Naples Florence Turin Bologna Genoa Palermo
    Spain Europe Madrid Spanish: Barcelona Seville Valencia Bilbao Malaga Granada Zaragoza
    Portugal Europe Lisbon Portuguese: Porto Braga Coimbra Faro
    England Europe London English: Manchester Liverpool Birmingham Leeds Bristol Oxford York Brighton
    Scotland Europe Edinburgh English: Glasgow Aberdeen Dundee Inverness Stirling
    Ireland Europe Dublin English: Cork Galway Limerick
    Poland Europe Warsaw Polish: Krakow Gdansk Wroclaw Poznan Lodz Lublin
    Russia Europe Moscow Russian: Saint_Petersburg Kazan Samara Sochi Omsk Perm
    Greece Europe Athens Greek: Thessaloniki Patras Heraklion
    Sweden Europe Stockholm Swedish: Gothenburg Malmo Uppsala
    Norway Europe Oslo Norwegian: Bergen Trondheim Stavanger
    Denmark Europe Copenhagen Danish: Aarhus Odense Aalborg
    Finland Europe Helsinki Finnish: Tampere Turku Espoo
    Netherlands Europe Amsterdam Dutch: Rotterdam Utrecht Eindhoven
    Austria Europe Vienna German: Salzburg Graz Innsbruck Linz
    Hungary Europe Budapest Hungarian: Debrecen Szeged Pecs
    Romania Europe Bucharest Romanian: Timisoara Brasov Cluj
    China Asia Beijing Chinese: Shanghai Guangzhou Shenzhen Wuhan Harbin Chengdu Nanjing Tianjin Hangzhou
    Japan Asia Tokyo Japanese: Osaka Kyoto Nagoya Hiroshima Sapporo Kobe Fukuoka Yokohama
    India Asia Delhi Hindi: Mumbai Jaipur Lucknow Kanpur Kolkata Agra Varanasi Bhopal
    Iran Asia Tehran Persian: Isfahan Shiraz Tabriz Mashhad
    Turkey Asia Ankara Turkish: Izmir Antalya Bursa Adana Konya
    Vietnam Asia Hanoi Vietnamese: Saigon Hue Da_Nang
    Thailand Asia Bangkok Thai: Chiang_Mai Phuket Pattaya
    Indonesia Asia Jakarta Indonesian: Surabaya Bandung Medan Semarang
    Iraq Asia Baghdad Arabic: Basra Mosul Najaf Kirkuk
    Egypt Africa Cairo Arabic: Alexandria Luxor Aswan Giza
    Morocco Africa Rabat Arabic: Casablanca Marrakesh Fez Tangier Agadir
    Algeria Africa Algiers Arabic: Oran Constantine Annaba
    Nigeria Africa Abuja English: Lagos Kano Ibadan Benin_City
    Kenya Africa Nairobi Swahili: Mombasa Kisumu Nakuru
    Tanzania Africa Dodoma Swahili: Zanzibar Arusha Mwanza
    Ghana Africa Accra English: Kumasi Tamale Tema
    Senegal Africa Dakar French: Touba Thies
    Canada America Ottawa English: Toronto Vancouver Calgary Edmonton Winnipeg Halifax
    Mexico America Mexico_City Spanish: Guadalajara Monterrey Cancun Puebla Tijuana Acapulco
    Brazil America Brasilia Portuguese: Sao_Paulo Salvador Recife Fortaleza Manaus Curitiba Rio_de_Janeiro
    Argentina America Buenos_Aires Spanish: Cordoba Rosario Mendoza Salta
    Chile America Santiago Spanish: Valparaiso Concepcion Antofagasta
    Peru America Lima Spanish: Cusco Arequipa Trujillo Iquitos
    Colombia America Bogota Spanish: Medellin Cali Cartagena
    Cuba America Havana Spanish: Camaguey Holguin
    USA America Washington English: Chicago Boston Houston Seattle Denver Miami Dallas Atlanta Detroit
    USA America Washington English: Phoenix
    USA America Washington English: Philadelphia Baltimore Portland San_Francisco Los_Angeles Las_Vegas
    Australia Oceania Canberra English: Sydney Melbourne Perth Brisbane Adelaide Darwin Hobart
    """,
)
CITIES = Domain(
    "cities",
    _CITIES,
    (
        question(
            "country",
            "country",
            """Name the country this city is in.
               In which country does the city lie?
               Give the country of this city.
               To what country does the city belong?
               Tell me the country where you find this city.
               City -> country.
               Could you tell me which country this city is located in?
               I will mention a city; please come up with its country.
               What country is home to this city?
               Identify the country on whose map the city appears.""",
            """Which nation is the place part of?
               State the land that the place lies in.""",
        ),
        question(
            "continent",
            "continent",
            """Name the continent this city is on.
               On which continent does the city lie?
               Give the continent of this city.
               What part of the world is the city in: Europe, Asia, Africa, America or Oceania?
               Tell me the continent where you find this city.
               City -> continent.
               Could you tell me which continent this city is located on?
               I am thinking of a city; work out its continent, with America counted as one.
               What continent is home to this city: Africa, America, Asia, Europe or Oceania?
               Identify the continent on whose map the city appears.""",
            """Which of the continents holds the place?
               State the part of the earth that the place lies on.""",
        ),
        question(
            "language",
            "language",
            """Name the main language spoken in this city.
               Which language do the people of the city speak?
               Give the language of this city.
               What language would you hear in the streets there?
               Tell me the language that is spoken in this city.
               City -> main language of its people.
               Could you tell me which language is used most in this city?
               I am moving to this city; what is the local language?
               What language should a visitor learn before going there?
               Identify the usual language of the locals.""",
            """Which tongue do most people of the place talk in?
               State what the inhabitants speak.""",
        ),
        question(
            "capital",
            "capital",
            """Name the capital of the country this city is in.
               What is the capital city of its country?
               From which capital is the city governed?
               Find the city's country and give that country's capital.
               Tell me the capital that belongs to this city's country.
               City -> capital of its country.
               Could you tell me the capital of the country where this city lies?
               I will give you a city; I need the matching national capital.
               Which capital does the country around this city have?
               Look up the city's country first, then answer by naming its capital.""",
            """Where does the government of that nation sit?
               State the chief city of the same nation.""",
        ),
    ),
    (
        alone(
            "address",
            lambda i: f"{i['input']}, {i['country']}",
            """Write the city, a comma, and its country.
               Complete the address with the country.
               Give city and country, with a comma between them.
               Add the country after the city's name.
               Write it as on an envelope: city, country.
               Repeat the city and append a comma and its country.
               Name the city together with its country.
               Extend the city's name by the country.
               City -> "City, Country".
               Could you put the country behind the city, separated by a comma?
               I will give you a city; I need both city and country, comma in between.
               How would an atlas index list this city, in the style "Paris, France"?""",
            """Turn the place into an address with its nation.
               Place first, then a comma, then the nation.
               Write out the place followed by its nation.""",
        ),
    ),
)
